"""Megatron's flags that this script would take and not follow: each ends the run with one line, where its value is not the default.

Of megatron-core 0.19's flags; tests/megatron_flags.py says of each of the others why it works. Names are those of the parsed
namespace. A launch script that names a flag with its default passes.
"""

import argparse

from rsa_megatron.training import ON_CPU

_QWEN2 = "the decoder is a Qwen2, which has no such thing; leave it out"
_TOWER = "tower and image size are those of --model; leave it out"
_DATA = "it is about Megatron's own data sets, and --data-path is an Energon one; leave it out"
_TOKENIZER = "the tokenizer is the Hugging Face one of --tokenizer-model; leave it out"
_OTHER_MODELS = "it is about another kind of model; leave it out"
_SCRIPT = "it is read by training scripts of Megatron-LM alone; leave it out"
_FSDP = "parameters cannot be sharded here; leave it out, and shard the optimizer by --use-distributed-optimizer"
_RESTART = "runs are not restarted within their process here; leave it out, and start the same command again"
_INFERENCE = "it is about generating text; leave it out"
_FROM_CHECKPOINT = "the model's sizes are those of --model; leave it out"

#: Reasons and remedies, and the flags that are refused for them.
REFUSED = {
    "the decoder has no experts; leave it out": """
        num_experts expert_model_parallel_size expert_tensor_parallel_size expert_tensor_parallel_num_weight_shards
        overlap_moe_expert_parallel_comm overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release
        delay_wgrad_compute high_priority_a2a_comm_stream use_fused_weighted_squared_relu use_grouped_gemm_for_dense_mlp
        use_grouped_gemm_for_shared_expert moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_overlap
        moe_shared_expert_glu_interleave_size moe_ffn_hidden_size moe_router_topk moe_enable_routing_replay
        moe_router_padding_for_quantization moe_router_padding_for_fp8 moe_router_num_groups moe_router_group_topk
        moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype
        moe_router_enable_expert_bias moe_router_bias_update_rate moe_router_quantile_balancing_ema
        moe_router_force_load_balancing moe_router_force_biased moe_grouped_gemm moe_single_grouped_weight
        moe_single_grouped_bias moe_z_loss_coeff moe_input_jitter_eps moe_token_dispatcher_type moe_enable_deepep
        moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs
        moe_per_layer_logging moe_expert_capacity_factor moe_pad_expert_input_to_capacity
        moe_pad_experts_for_cuda_graph_inference moe_token_drop_policy moe_layer_recompute moe_permute_fusion moe_router_fusion
        moe_apply_probs_on_input moe_latent_size moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing
        moe_ncclep_static_shape moe_ncclep_zero_copy moe_mlp_glu_interleave_size moe_expert_rank_capacity_factor moe_paged_stash
        moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu moe_layer_freq
        moe_use_upcycling moe_router_load_balancing_type moe_aux_loss_coeff moe_upcycling_granularity moe_routing_trace_path
        moe_routing_trace_max_training_iters moe_routing_trace_capture_logits moe_routing_trace_capture_hidden_states
        moe_routing_trace_dump_weights save_tokens_per_expert_interval""",
    "the decoder predicts the next token alone; leave it out": """
        mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads mtp_hybrid_override_pattern
        mtp_standalone""",
    _QWEN2: """
        multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rotary_scaling_factor mscale
        mscale_all_dim cache_mla_latents mla_down_proj_fusion experimental_attention_variant dsa_indexer_n_heads
        dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff
        dsa_indexer_use_sparse_loss dsa_kernel_backend dsa_indexer_rope_interleaved dsa_indexer_rotate_activation
        dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 linear_conv_kernel_dim linear_key_head_dim
        linear_value_head_dim linear_num_key_heads linear_num_value_heads linear_attention_freq attention_output_gate softmax_type
        apply_residual_connection_post_layernorm layernorm_zero_centered_gamma add_bias_linear add_qkv_bias glu_linear_offset
        activation_func_clamp_value rotary_interleaved normalization qk_layernorm qk_l2_norm qk_clip qk_clip_alpha
        qk_clip_threshold apply_wd_to_qk_layernorm no_weight_decay_cond_type window_size window_attn_skip_freq
        position_embedding_type yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
        yarn_correction_range_round_to_int rope_type use_rope_scaling rope_scaling_factor rotary_seq_len_interpolation_factor
        no_rope_freq add_position_embedding relative_attention_num_buckets relative_attention_max_distance mrope_section
        openai_gelu squared_relu quick_geglu swiglu group_query_attention use_mup mup_width_mult mup_base_hidden_size
        mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power heterogeneous_layers_config_path
        heterogeneous_layers_config_encoded_json use_kitchen_attention kitchen_attention_backend""",
    _OTHER_MODELS: """
        is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path
        mamba_training_ssm_states_dtype hybrid_layer_pattern hybrid_override_pattern encoder_num_layers decoder_num_layers
        encoder_seq_length decoder_seq_length bert_binary_head ict_head_size biencoder_projection_dim
        biencoder_shared_query_context_model ict_load bert_load titles_data_path query_in_block_prob use_one_sent_docs
        evidence_data_path retriever_report_topk_accuracies retriever_score_scaling block_data_path embedding_path
        indexer_batch_size indexer_log_interval num_classes classes_fraction data_per_class_fraction head_lr_mult
        vision_pretraining vision_pretraining_type vision_backbone_type swin_backbone_type mask_type mask_factor iter_per_epoch
        dino_local_img_size dino_local_crops_number dino_head_hidden_size dino_bottleneck_size dino_freeze_last_layer
        dino_norm_last_layer dino_warmup_teacher_temp dino_teacher_temp dino_warmup_teacher_temp_epochs""",
    _TOWER: "img_h img_w num_channels patch_dim",
    _DATA: """
        split train_data_path valid_data_path test_data_path data_args_path per_split_data_args_path per_dataset_sequences_path
        dataloader_fast_cache_load dataloader_defer_npy_index_mmap data_cache_path mmap_bin_files mock_data sample_rate mask_prob
        short_seq_prob reset_position_ids reset_attention_mask dataloader_inter_document_masking eod_mask_loss
        num_dataset_builder_threads object_storage_cache_path mid_level_dataset_surplus allow_ambiguous_pad_tokens fim_data
        fim_rate fim_spm_rate fim_split_sample fim_fragment_rate fim_no_prefix fim_prefix_token fim_middle_token fim_suffix_token
        fim_pad_token fim_eod_token phase_transition_iterations multiple_validation_sets validation_set_names data_sharding
        dataloader_type sft_tokenizer_prompt_format max_seqlen_per_dp_cp_rank""",
    "it does not go with this script's data; leave it out": """
        full_validation iterations_to_skip result_rejected_tracker_filename sft hybrid_context_parallel""",
    _TOKENIZER: """
        tokenizer_type vocab_size padded_vocab_size pad_vocab_size vocab_file merge_file vocab_extra_ids metadata_path
        special_tokens tiktoken_pattern tiktoken_num_special_tokens tokenizer_sentencepiece_legacy
        tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_hf_no_use_fast tokenizer_hf_no_include_special_tokens
        trust_remote_code null_tokenizer_eod_id null_tokenizer_pad_id chat_template""",
    _INFERENCE: """
        flash_decode batch_invariant_mode symmetric_ar_type nccl_all_reduce_for_prefill inference_fuse_tp_communication
        inference_disable_triton_nvls_kernels inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
        inference_moe_token_dispatcher_type inference_cuda_graph_scope mlp_chunks_for_prefill test_mode inference_rng_tracker
        inference_batch_times_seqlen_threshold max_tokens_to_oom output_bert_embeddings bert_embedder_type
        use_legacy_static_engine inference_max_requests inference_max_seq_length inference_dynamic_batching
        inference_dynamic_batching_buffer_size_gb inference_dynamic_batching_paused_buffer_size_gb
        inference_dynamic_batching_mamba_memory_ratio inference_dynamic_batching_block_size
        inference_dynamic_batching_max_requests inference_dynamic_batching_max_tokens
        inference_dynamic_batching_num_cuda_graphs inference_dynamic_batching_track_paused_request_events
        inference_dynamic_batching_track_generated_token_events decode_only_cuda_graphs inference_cuda_graph_all_prefills
        inference_cuda_graph_max_tokens inference_dynamic_batching_unified_memory_level enable_chunked_prefill
        num_speculative_tokens inference_dynamic_batching_enable_prefix_caching
        inference_dynamic_batching_prefix_caching_eviction_policy inference_dynamic_batching_prefix_caching_coordinator_policy
        inference_dynamic_batching_prefix_caching_routing_alpha inference_dynamic_batching_prefix_caching_mamba_gb
        inference_dynamic_batching_cuda_graph_mixed_prefill_count inference_dynamic_batching_cuda_graph_sizing_distribution
        inference_dynamic_batching_sampling_backend offset_sampling_seed_by_dp_rank inference_dynamic_batching_async_sched_mode
        inference_dynamic_batching_logprobs_mode inference_logging_step_interval inference_text_gen_server_logging
        inference_wandb_logging inference_coordinator_port mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype
        inference_use_synchronous_zmq_collectives inference_disable_ep_consensus inference_shards""",
    "there is no reinforcement learning here; leave it out": """
        perform_rl_step rl_prompts_per_eval grpo_prompts_per_step grpo_group_size rl_generation_lag rl_submission_granularity
        rl_consumption_granularity grpo_iterations grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_kl_beta grpo_entropy_term_weight
        grpo_filter_groups_with_same_reward langrl_env_config rl_default_temperature rl_default_top_p rl_default_top_k
        rl_offload_optimizer_during_inference rl_kv_cache_management_mode rl_persist_cuda_graphs rl_partial_rollouts
        rl_inference_logprobs_is_correction rl_importance_sampling_truncation_coef rl_use_sequence_packing
        rl_sequence_packing_max_sequences_per_bin rl_sequence_packing_algo rl_training_cuda_graphs
        rl_inference_tensor_model_parallel_size rl_inference_pipeline_model_parallel_size rl_inference_expert_model_parallel_size
        rl_inference_expert_tensor_model_parallel_size rl_inference_model_unified_memory_level
        rl_offload_inference_model_weights_when_idle refit_method rl_verify_model_weights_swap rl_skip_bos_token rl_profile
        rl_profile_dir rl_inference_parsers""",
    "there is no distillation here; leave it out": """
        logits_save_top_k logits_save_top_p logits_save_top_p_min_k logits_save_dir logits_save_dtype logits_load_dir
        logits_load_decode_threads logits_load_prefetch_factor logits_load_msc_prefetch_depth logits_load_kd_loss_alpha
        logits_load_ignore_errors""",
    _FSDP: """
        use_megatron_fsdp use_torch_fsdp2 data_parallel_sharding_strategy outer_dp_sharding_strategy fsdp_double_buffer
        fsdp_manual_registration fsdp_db_use_persist_buf_on_alloc_fail suggested_communication_unit_size keep_fp8_transpose_cache
        enable_full_sharding_in_hsdp torch_fsdp2_reshard_after_forward megatron_fsdp_main_params_dtype
        megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype megatron_fsdp_enable_fine_grained_param_gather
        megatron_fsdp_max_pool_double_buffer strict_fsdp_dtensor_load gradient_reduce_div_fusion init_model_with_meta_device
        create_all_gather_group tensor_parallel_num_weight_shards""",
    _RESTART: """
        inprocess_restart inprocess_max_iterations inprocess_monitor_thread_interval inprocess_monitor_process_interval
        inprocess_progress_watchdog_interval inprocess_heartbeat_interval inprocess_soft_timeout inprocess_hard_timeout
        inprocess_heartbeat_timeout inprocess_barrier_timeout inprocess_completion_timeout inprocess_last_call_wait
        inprocess_termination_grace_time inprocess_granularity inprocess_active_world_size inprocess_empty_cuda_cache""",
    _FROM_CHECKPOINT: "use_checkpoint_args use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args",
    _SCRIPT: """
        spec yaml_cfg fp16_lm_cross_entropy check_for_spiky_loss log_straggler straggler_ctrlr_port straggler_minmax_count
        disable_straggler_on_startup run_workload_inspector_server""",
    "Megatron 0.19 does not read it; leave it out": """
        use_flash_attn onnx_safe exit_signal_handler_for_dataloader dist_ckpt_format_deprecated dist_ckpt_save_pre_mcore_014""",
    "Megatron 0.19 does not read it; name --step-batch-size-schedule and --train-samples": "rampup_batch_size",
    "Megatron has no such flag any more; name --micro-batch-size": "batch_size",
    "Megatron has no such flag any more; name --lr-warmup-fraction": "warmup",
    "Megatron has no such flag any more; name --tensor-model-parallel-size": "model_parallel_size",
    "Megatron has no such flag any more; name --recompute-activations": "checkpoint_activations",
    "it is of Megatron's own optimizers, which are not installed with it; choose --optimizer adam or sgd": """
        muon_momentum muon_split_qkv muon_nesterov muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type muon_num_ns_steps
        muon_tp_mode muon_extra_scale_factor muon_scalar_optimizer lion_beta1 lion_beta2 use_layer_wise_param_layout""",
    "parts of the model have their rates by --vision-lr and --projector-lr; leave it out": "decoupled_lr decoupled_min_lr",
    "what is trained is named by --trainable; leave it out": "freeze_all_layers",
    "pretrain() goes on with process groups at once; leave it out": "lazy_mpu_init fake_process_group",
    "no released PyTorch has ring exchanges; leave it out": "use_ring_exchange_p2p",
    "Megatron 0.19 stops on it; leave it out": "init_method_xavier_uniform config_logger_dir",
    "--save is a folder of the file system; leave it out": "enable_msc",
    "checkpoints are converted by rsa-megatron convert; leave it out": """
        ckpt_convert_format ckpt_convert_save ckpt_convert_update_legacy_dist_opt_format""",
    "checkpoints lie in --save, and not in a node's memory or disk; leave it out": """
        non_persistent_local_ckpt_dir non_persistent_local_ckpt_algo replication replication_jump replication_factor""",
}

#: Flags of which some values are refused: the values that are not, and the remedy.
CHOICES = {
    "optimizer": (("adam", "sgd"), "Megatron's other optimizers are not installed with it; choose adam or sgd"),
    "ckpt_format": (("torch_dist", "torch"), "it is of parameters sharded by FSDP; choose torch_dist"),
    "non_persistent_ckpt_type": ((None, "global"), "checkpoints lie in --save; choose global"),
}

#: Flags that need Transformer Engine's layers.
NEEDS_TRANSFORMER_ENGINE = """
    tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad
    tp_comm_split_ag tp_comm_split_rs tp_comm_overlap_cfg tp_comm_bootstrap_backend cp_comm_type
    hierarchical_context_parallel_sizes attention_backend flash_attention_version log_max_attention_logit
    use_te_activation_func use_transformer_engine_op_fuser fused_residual_rmsnorm te_rng_tracker te_precision_config_file fp8
    fp8_recipe fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad
    fp8_output_proj fp8_param_gather first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4 fp4_recipe
    fp4_quantizer_factory fp4_param_gather reuse_grad_buf_for_mxfp8_param_ag stream_ckpt_dequant cpu_offloading_num_layers
    cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
    delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks activation_offload_fraction
    fine_grained_offloading_max_inflight_offloads defer_embedding_wgrad_compute wgrad_deferral_limit
    use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype optimizer_cpu_offload
    optimizer_offload_fraction use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params
    optimizer_cuda_graph fp32_residual_connection save_activations_interval save_dgrads_interval
    recompute_modules"""

#: Flags that need a GPU.
NEEDS_CUDA = """
    enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_warmup_steps cuda_graph_modules cuda_graph_scope_deprecated
    pipeline_model_parallel_comm_backend nccl_communicator_config_path use_sharp sharp_enabled_group high_priority_stream_groups
    nccl_ub disable_symmetric_registration ddp_pad_buckets_for_high_nccl_busbw flight_recorder_dump_path
    flight_recorder_trace_buffer_size flight_recorder_dump_on_timeout flight_recorder_include_stack_trace
    flight_recorder_include_only_active flight_recorder_extra_dump_on_exec distributed_backend gpu_sniff_test_interval log_energy
    log_device_memory_used log_memory_to_tensorboard log_memory_interval record_memory_history memory_snapshot_path nvtx_ranges
    record_shapes empty_unused_memory_level train_sync_interval disable_bf16_reduced_precision_matmul
    async_save async_strategy use_persistent_ckpt_worker async_ckpt_cpu_priority async_ckpt_io_priority async_ckpt_use_cpu_shm"""


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raise ValueError for the first flag of the command line that would not be followed, with what to do about it.

    Args:
        parser: with the defaults that --model and --stage set.
        args: what it has made of the command line, before Megatron changes it.
    """
    for reason, names in _refusals(args).items():
        for name in names.split():
            if is_changed(parser, args, name):
                raise ValueError(f"{flag_of(parser, name)}: {reason}")
    for name, (choices, remedy) in CHOICES.items():
        if getattr(args, name) not in choices:
            raise ValueError(f"{flag_of(parser, name)} {getattr(args, name)}: {remedy}")
    if ON_CPU and args.profile and not args.use_pytorch_profiler:
        raise ValueError("--profile: Nsight needs a GPU; add --use-pytorch-profiler, or leave it out")
    if args.wandb_project and not (args.wandb_save_dir or args.save):
        raise ValueError("--wandb-project: name --save or --wandb-save-dir too, for its files")
    if args.step_batch_size_schedule and not args.train_samples:
        # With iterations Megatron ends the learning rate's decay at iterations x the first batch size.
        raise ValueError("--step-batch-size-schedule: name --train-samples beside it, and not --train-iters")


def _refusals(args: argparse.Namespace) -> dict[str, str]:
    found = dict(REFUSED)
    if args.transformer_impl != "transformer_engine":
        found["it needs Transformer Engine's layers (--transformer-impl transformer_engine); leave it out"] = (
            NEEDS_TRANSFORMER_ENGINE
        )
    if ON_CPU:
        found["it needs a GPU; leave it out"] = NEEDS_CUDA
    return found


def is_changed(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> bool:
    """Return whether an argument is another than its default (a list of one value is that value)."""
    # Not get_default(): of two flags of one name argparse begins with the first one's default, also where that is None.
    value, default = getattr(args, name), next(action.default for action in parser._actions if action.dest == name)
    return value != default and value != [default]


def flag_of(parser: argparse.ArgumentParser, name: str) -> str:
    """Return the flag that sets an argument: of several, the first."""
    return next(action.option_strings[0] for action in parser._actions if action.dest == name)
