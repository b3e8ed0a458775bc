"""How each flag of megatron-core 0.19's parser is known to work in the training script; those of flag_checks.py are refused.

Names are of the parsed namespace, a family a line. tests/scripts/test_flags.py compares the union with the parser itself, so that
a new version's flag is missed by its name.
"""

#: What a test or a recipe of this project relies on.
TESTED = {
    "layouts, in tests/distributed/test_parity.py and scripts/test_pretrain_layouts.py": """
        tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel num_virtual_stages_per_pipeline_rank
        num_layers_per_virtual_pipeline_stage decoder_first_pipeline_num_layers use_distributed_optimizer overlap_grad_reduce
        overlap_param_gather ddp_average_in_collective calculate_per_token_loss context_parallel_size""",
    "the model, in tests/distributed/test_hf_parity.py and scripts/test_pretrain_bad_input.py": """
        num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size kv_channels rotary_percent rotary_base
        layernorm_epsilon max_position_embeddings untie_embeddings_and_output_weights make_vocab_size_divisible_by
        transformer_impl seq_length tokenizer_model""",
    "recipes, in tests/scripts/test_recipes.py": """
        micro_batch_size global_batch_size lr min_lr lr_decay_style lr_warmup_fraction lr_warmup_init weight_decay adam_beta1
        adam_beta2 adam_eps clip_grad num_workers log_interval eval_interval eval_iters save_interval train_iters train_samples
        data_path hidden_dropout attention_dropout bf16 seed""",
    "checkpoints, in tests/scripts/test_pretrain_resume.py, test_stages.py and test_revision.py": """
        save load pretrained_checkpoint ckpt_step finetune no_save_optim no_save_rng no_load_optim no_load_rng exit_interval
        exit_signal_handler exit_signal override_opt_param_scheduler dist_ckpt_optim_fully_reshardable skip_train""",
    "the log, in tests/scripts/test_pretrain.py and distributed/test_utilisation.py": """
        tensorboard_dir wandb_project wandb_exp_name wandb_save_dir log_throughput log_timers_to_tensorboard""",
    "recomputation, in tests/distributed/test_models_refused.py and test_layout_memory.py": """
        recompute_activations recompute_granularity recompute_method recompute_num_layers""",
    "a loss that is not finite, in tests/scripts/test_pretrain_bad_input.py": """
        rerun_mode check_for_nan_in_loss_and_grad""",
    "steps of growing batches, in tests/scripts/test_flags.py": "step_batch_size_schedule",
}

#: Tried in real small runs on the CPU (three iterations, one or two ranks; the loss is that of a run without them, or differs as
#: it should): several flags a run.
TRIED = {
    "logging": """
        log_params_norm log_num_zeros_in_grad log_world_size_to_tensorboard log_validation_ppl_to_tensorboard log_progress
        timing_log_level timing_log_option barrier_with_L1_time tensorboard_log_interval tensorboard_queue_size logging_level
        log_loss_scale_to_tensorboard dump_param_to_param_group_map enable_one_logger""",
    "profiling, by PyTorch's profiler on the CPU": """
        profile use_pytorch_profiler profile_step_start profile_step_end pytorch_profiler_collect_shapes
        pytorch_profiler_collect_callstack profile_ranks""",
    "the training loop": """
        manual_gc manual_gc_interval manual_gc_eval check_weight_hash_across_dp_replicas_interval check_for_large_grads
        exit_duration_in_mins enable_experimental disable_jit_fuser deterministic_mode distributed_timeout_minutes
        distributed_timeout_seconds_after_init decrease_batch_size_if_needed use_gloo_process_groups""",
    "evaluation": "start_eval_at_iter eval_global_batch_size eval_micro_batch_size",
    "gradients": """
        ddp_num_buckets ddp_bucket_size align_grad_reduce align_param_gather ddp_reduce_scatter_with_fp32_accumulation
        accumulate_allreduce_grads_in_fp32 grad_reduce_in_bf16 num_distributed_optimizer_instances""",
    "pipelines": """
        microbatch_group_size_per_vp_stage overlap_p2p_comm_warmup_flush overlap_p2p_comm pipeline_model_parallel_layout
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split decoder_last_pipeline_num_layers""",
    "precision": """
        fp16 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis attention_softmax_in_fp32
        apply_query_key_layer_scaling cross_entropy_loss_fusion""",
    "optimizer": """
        optimizer sgd_momentum lr_warmup_iters weight_decay_incr_style start_weight_decay end_weight_decay lr_wsd_decay_style lr_wsd_decay_iters
        lr_decay_iters""",
    "initialization": """
        init_method_std embedding_init_method_std perform_initialization data_parallel_random_init use_cpu_initialization
        clone_scatter_output_in_embedding mlp_chunks_for_training""",
    "recomputation": "distribute_saved_activations",
    "checkpoints": """
        save_params_interval save_wgrads_interval save_retain_interval non_persistent_save_interval non_persistent_ckpt_type
        non_persistent_global_ckpt_dir ckpt_format ckpt_fully_parallel_save ckpt_fully_parallel_load
        ckpt_assume_constant_structure dist_ckpt_workers dist_ckpt_strictness verify_integrity
        distrib_optim_fully_reshardable_mem_efficient ckpt_fully_parallel_save_process_group exit_on_missing_checkpoint
        load_main_params_from_ckpt auto_detect_ckpt_format ckpt_fully_parallel_load_process_group
        ckpt_load_validate_sharding_integrity use_checkpoint_opt_param_scheduler""",
    "checkpoints, with --restart-data": "override_ckpt_iteration",
}

#: Megatron reads it from the namespace on the way that our script goes; nothing of ours comes between.
PASSED_ON = {
    "optimizer and schedule": """
        lr_decay_samples lr_warmup_samples lr_wsd_decay_samples""",
    "checkpoints": "ckpt_fully_parallel_load_exchange_algo",
    "fusions of Transformer Engine's layers, which are off with local ones": """
        masked_softmax_fusion bias_gelu_fusion bias_swiglu_fusion bias_dropout_fusion apply_rope_fusion no_persist_layer_norm
        gradient_accumulation_fusion""",
    "processes": "local_rank",
    "logging": "wandb_entity one_logger_project one_logger_run_name one_logger_async app_tag_run_name app_tag_run_version",
    "gradients": "ddp_param_name_patterns_for_fp32_local_accumulation",
    "choices that other flags narrow, whose bad values Megatron itself refuses in one line": """
        cross_entropy_fusion_impl overlap_param_gather_with_optimizer_step""",
    "errors on purpose": "error_injection_rate error_injection_type",
}

#: What the flag asks for is so without it.
ALWAYS_SO = """
    use_rotary_position_embeddings create_attention_mask_in_dataloader deprecated_use_mcore_models use_dist_ckpt_deprecated
    ckpt_fully_parallel_save_deprecated disable_msc_deprecated"""

#: Not known; why. (Those of flag_checks.NEEDS_TRANSFORMER_ENGINE and NEEDS_CUDA are refused without either; with it, they are passed on
#: and have not been tried, as no run on GPUs has had them.)
UNCHECKED = {
    "two data-parallel groups at least in which ranks are renumbered": "use_tp_pp_dp_mapping",
    "NVIDIA's own clusters": "adlr_autoresume adlr_autoresume_interval",
    "packages that cannot be installed here (nvidia-resiliency-ext)": "enable_ft_package calc_ft_timeouts ft_num_warmup_iters",
    "PyTorch's profiler with the Chakra writer, which is another package": "pytorch_profiler_collect_chakra",
    "it ends ranks on purpose": """
        fault_injector_ranks fault_injector_num_ranks fault_injector_fault_types fault_injector_fault_probabilities
        fault_injector_fault_delay fault_injector_delay_start_iteration fault_injector_mtti_seconds fault_injector_offset_seconds
        fault_injector_seed""",
    "signals that end a run before its checkpoint, in data workers too": "exit_signal_handler_for_training",
}
