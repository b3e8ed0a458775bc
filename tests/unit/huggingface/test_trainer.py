"""The mixin in a Trainer of one process: off, beside what a Trainer is used with, and what it says or refuses."""

import pytest
import torch
import transformers

from rsa_megatron import RSAConfig
from rsa_megatron.huggingface import Family, RSATrainerMixin
from rsa_megatron.huggingface import trainer as mixin
from rsa_megatron.huggingface.families import mean_of_grid
from tests.support import trainer_models, trainer_runs
from tests.support.trainer_models import Sample
from tests.support.trainer_runs import RSATrainer

pytestmark = pytest.mark.slow

ON = RSAConfig(weight=2e-3)


def make(trainer_class=RSATrainer, name="qwen2_5_vl", model=None, chosen=None, **options):
    kind = trainer_models.tiny(name)
    model = kind.build() if model is None else model
    options = dict(per_device_train_batch_size=3, gradient_accumulation_steps=2) | options
    return trainer_runs.make_trainer(trainer_class, kind, model, chosen or trainer_models.samples(12), **options)


def train(*args, **options):
    trainer = make(*args, **options)
    trainer.train()
    return trainer


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))


def figures(trainer) -> list[dict]:
    """What does not depend on the clock."""
    return [
        {k: x for k, x in line.items() if "run" not in k and "second" not in k} for line in trainer.state.log_history
    ]


def test_weight_0_is_the_trainer_without_rsa_bit_for_bit():
    plain, off = train(transformers.Trainer, max_steps=2), train(max_steps=2, rsa=RSAConfig(weight=0))
    assert same(plain, off) and figures(plain) == figures(off)
    assert list(plain.model.state_dict()) == list(off.model.state_dict())
    on = train(max_steps=2, rsa=ON)
    assert list(plain.model.state_dict()) == list(on.model.state_dict())
    assert not same(plain, on)  # the comparison can fail


@pytest.mark.parametrize("name, is_reentrant", [("qwen2_5_vl", False), ("llava_onevision", True)])
def test_gradient_checkpointing_changes_nothing(name, is_reentrant):
    chosen = trainer_models.samples(6)
    options = dict(per_device_train_batch_size=3, gradient_accumulation_steps=2)
    expected = trainer_runs.take_step(name, chosen, ON, **options)
    recomputed = trainer_runs.take_step(
        name,
        chosen,
        ON,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": is_reentrant},
        **options,
    )
    # The same operations on the same numbers; sums of gradients may come in another order.
    assert trainer_runs.differ_by(recomputed.gradients, expected.gradients) < 1e-6
    without = trainer_runs.take_step(name, chosen, RSAConfig(weight=0), **options)
    assert trainer_runs.differ_by(without.gradients, expected.gradients) > 0.1


def test_evaluation_and_generation_read_nothing():
    trainer = make(rsa=ON, per_device_eval_batch_size=3)
    plain = make(transformers.Trainer, per_device_eval_batch_size=3)
    held_out = trainer_models.samples(6, first=20)
    assert trainer.evaluate(held_out)["eval_loss"] == plain.evaluate(held_out)["eval_loss"]
    trainer.train()
    model = trainer.model.eval()
    assert not any(module._forward_hooks for module in model.modules())


def test_columns_of_rsas_own_reach_rsa_and_not_the_model():
    """In training, in evaluation with labels and without, and where a Trainer takes off the columns that a model does not know."""
    chosen = trainer_models.samples(6)
    kind = trainer_models.tiny("qwen2_5_vl")

    trainer = make(chosen=chosen, rsa=ON)
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: collate(samples) | {"rsa_eligible": torch.tensor([1, 0, 1])}
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rsa_pairs"] == 2 and log["rsa_left_out_not_eligible"] == 2
    batch = kind.batch(trainer.model, chosen) | {"rsa_eligible": torch.ones(6)}
    loss, _, _ = trainer.prediction_step(trainer.model.eval(), batch, True)
    assert loss > 0
    del batch["labels"]
    trainer.prediction_step(trainer.model, batch, False)
    trainer._set_signature_columns_if_needed()
    assert {"rsa_eligible", "rsa_caption_mask", "pixel_values"} <= set(trainer._signature_columns)


class Adapted(torch.nn.Module):
    """What PEFT makes of a model: the same, with adapters beside some of its frozen layers, inside a module."""

    def __init__(self, model, adapts_text: bool):
        super().__init__()
        self.base_model, self.config = model.requires_grad_(False), model.config
        self.accepts_loss_kwargs = False
        of = "language_model" if adapts_text else "visual"
        for name, module in list(model.named_modules()):
            if of in name and (name.endswith("q_proj") or name.endswith("attn.qkv")):
                module.adapter = torch.nn.Linear(module.in_features, module.out_features, bias=False)
                module.register_forward_hook(lambda module, args, output: output + module.adapter(args[0]))

    def forward(self, **inputs):
        return self.base_model(**inputs)

    def get_image_features(self, **pixels):
        return self.base_model.get_image_features(**pixels)


def test_adapters_train_and_a_side_without_them_is_named(caplog):
    transformers.utils.logging.enable_propagation()
    for adapts_text, named in ((True, "vision"), (False, None)):
        caplog.clear()
        model = trainer_models.tiny("qwen2_5_vl").build()
        trainer = train(model=Adapted(model, adapts_text), rsa=ON, max_steps=2)
        assert trainer.state.log_history[0]["rsa_loss"] > 0
        lines = [line for line in caplog.messages if "no gradient" in line]
        # Adapters of the tower alone reach the text side too: its states come after.
        assert len(lines) == (1 if named else 0) and all(f"the {named} side" in line for line in lines)
    transformers.utils.logging.disable_propagation()


def test_steps_without_two_pairs_are_said_once(caplog):
    transformers.utils.logging.enable_propagation()
    texts = [Sample((), (20 + n, 30, 40)) for n in range(12)]
    trainer = train(chosen=texts, rsa=ON, max_steps=2)
    assert sum("no two pairs could be compared" in line for line in caplog.messages) == 1
    first, second, _ = trainer.state.log_history
    assert first["rsa_loss"] == first["rsa_pairs"] == 0 and second["rsa_left_out_no_image"] == 6
    caplog.clear()
    one = RSAConfig(weight=2e-3, scope="global-batch")
    trainer = train(rsa=one, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert trainer.state.log_history[0]["rsa_pairs"] == 4 and trainer.state.log_history[0]["rsa_loss"] > 0
    assert not caplog.messages
    transformers.utils.logging.disable_propagation()


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(layers="-1:3"), "only the last layers"),
        (dict(text_source="caption"), "in their sequence"),
        (dict(base_tile="last"), "follows from the model"),
        (dict(scope="global-batch", normalize="mean-distance"), "mean distance"),
    ],
)
def test_settings_that_a_trainer_does_not_follow_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make(rsa=RSAConfig(**settings))
    make(rsa=RSAConfig(weight=0, **settings))  # off is off


def test_what_would_not_be_right_is_refused_in_a_line():
    trainer = make(rsa=ON)
    batch = trainer.data_collator(trainer_models.samples(3))
    trainer.model.train()
    with pytest.raises(ValueError, match="rsa_caption_mask of shape"):
        trainer.compute_loss(trainer.model, batch | {"rsa_caption_mask": batch["labels"][:, 1:]})
    with pytest.raises(ValueError, match="rsa_eligible of shape"):
        trainer.compute_loss(trainer.model, batch | {"rsa_eligible": torch.ones(2)})
    trainer.get_tp_size = lambda: 2  # as of a model that transformers has split over ranks
    with pytest.raises(ValueError, match=r"tensor parallelism \(tp_size=2\) must be 1"):
        mixin._check_ranks(trainer)
    mine = make(rsa=ON, rsa_family=Family("visual.patch_embed.proj", mean_of_grid))
    with pytest.raises(ValueError, match="image_grid_thw"):
        mine.compute_loss(mine.model.train(), batch | {"image_grid_thw": batch["image_grid_thw"]})
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**trainer_models.TEXT))
    with pytest.raises(ValueError, match="does not know the model type qwen2.*llava_onevision"):
        make(model=model, rsa=ON)


def test_the_mixin_stands_first():
    class Wrong(transformers.Trainer, RSATrainerMixin):
        pass

    with pytest.raises(TypeError, match="rsa"):
        make(Wrong, rsa=ON)
