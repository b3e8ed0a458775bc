"""The plugin as an existing job uses it: three wraps, nothing else of the job changed, nothing added to its checkpoints."""

import copy
import inspect
import pickle

import pytest
import torch

from rsa_megatron.plugin import _as_selection, _of_batch, _Reader
from tests.support import layouts, processes, tiny
from tests.support.layouts import PP


def flags(demo):
    return ["--tokenizer-model", str(demo / "tokenizer"), "--data-path", str(demo / "data" / "captions")]


def names_in_checkpoints(argv):
    from megatron.core.utils import unwrap_model

    (model,) = unwrap_model(layouts.Trainer(argv).model)
    return list(model.state_dict()), sorted(model.sharded_state_dict()), [name for name, _ in model.named_modules()]


def test_the_model_and_its_checkpoints_stay_as_they_are(demo):
    with_rsa, without = (
        processes.run(names_in_checkpoints, 1, [*flags(demo), "--rsa-weight", weight])[0] for weight in ("1", "0")
    )
    assert with_rsa == without


def weighted(loss_mask):
    batch = tiny.batch(0)
    batch.loss_mask = loss_mask(batch.loss_mask)
    return batch


@pytest.mark.parametrize(
    "loss_mask",
    [
        lambda mask: mask * torch.linspace(0.3, 2.5, mask.shape[1]),
        lambda mask: mask.double() * 3,
        lambda mask: mask * (torch.arange(mask.shape[1]) < 3),
    ],
    ids=["weights", "float64", "most of the caption not learnt"],
)
def test_the_loss_mask_comes_back_as_it_was(demo, loss_mask):
    batch = weighted(loss_mask)
    with_rsa, without = (
        layouts.run(layouts.SINGLE, [[batch]], [*flags(demo), "--rsa-weight", weight]).losses[0]
        for weight in ("1", "0")
    )
    assert with_rsa["lm loss"] == without["lm loss"]
    # The caption's rows are found by its sign alone: the same whatever the weights.
    plain = layouts.run(layouts.SINGLE, [[tiny.batch(0)]], [*flags(demo), "--rsa-weight", "1"]).losses[0]
    assert with_rsa["rsa loss"] == plain["rsa loss"] > 0


def without_hooks():
    from rsa_megatron import RSAPlugin

    RSAPlugin.wrap_model_provider = lambda self, provider: provider


def without_forward_step():
    from rsa_megatron import RSAPlugin

    RSAPlugin.wrap_forward_step = lambda self, step: step


@pytest.mark.parametrize(
    "sabotage, message",
    [
        (without_hooks, "wrap the model provider too"),
        (without_forward_step, "its forward step is not wrapped"),
    ],
)
def test_a_plugin_half_attached_is_named(demo, sabotage, message):
    with pytest.raises(processes.Failed, match=message):
        layouts.run(layouts.SINGLE, [[tiny.batch(0)]], flags(demo), sabotage=sabotage)


def test_a_selection_of_another_kind_is_named():
    with pytest.raises(ValueError, match=r"select=...\) gave list: give \(caption_mask, eligible\) or an RSASamples"):
        _as_selection([torch.ones(2), torch.ones(2)])


class Counter:
    """A data iterator with more to it than its batches, copied in a way of its own."""

    def __init__(self):
        self.state = [0]

    def __next__(self):
        self.state[0] += 1
        return {"rsa_caption_mask": self.state[0]}

    def __deepcopy__(self, memo):
        return Counter()


def test_the_reader_that_a_forward_step_is_given_can_be_copied_and_pickled():
    reader = _Reader(Counter(), _of_batch)
    next(reader)
    for made in (copy.copy(reader), pickle.loads(pickle.dumps(reader))):
        assert isinstance(made, _Reader) and made.selection == (1, None) and made.state == [1]
    deep = copy.deepcopy(reader)
    assert isinstance(deep, _Reader) and deep.state == [0] and reader.state == [1]
    assert not hasattr(reader, "another") and not hasattr(_Reader.__new__(_Reader), "state")


class TheirBatch(dict):
    """Another job's batch: a dictionary, with no notion of RSA."""


def a_job_with_batches_of_its_own(argv):
    """Their iterator gives dictionaries; their forward step takes them apart; the plugin is told how to read them."""
    import pretrain_llava_rsa as script

    from rsa_megatron import RSAPlugin

    right, plugins = script.forward_step, []

    class Unpacked:
        def __init__(self, iterator):
            self.iterator = iterator

        def __next__(self):
            return next(self.iterator)["llava"]

    def their_forward_step(data_iterator, model):
        return right(Unpacked(data_iterator), model)

    def their_plugin():
        plugins.append(RSAPlugin(select=lambda batch: batch["pairs"]))
        return plugins[-1]

    script.forward_step, script.RSAPlugin = their_forward_step, their_plugin
    trainer = layouts.Trainer(argv)
    whole = tiny.batch(0)
    return trainer.step([TheirBatch(llava=whole, pairs=whole.rsa)], 0)


def our_job(argv):
    return layouts.Trainer(argv).step([tiny.batch(0)], 0)


def test_a_job_with_batches_of_its_own_says_how_to_read_them(demo):
    (theirs,), (ours,) = (processes.run(job, 1, flags(demo)) for job in (a_job_with_batches_of_its_own, our_job))
    assert theirs == ours and theirs["rsa loss"] > 0


def a_job_without_pairs(argv):
    """Two steps of two micro-batches of text; what each rank prints."""
    import pretrain_llava_rsa as script

    from rsa_megatron import RSAPlugin

    script.RSAPlugin = lambda: RSAPlugin(select=lambda batch: batch.rsa)
    trainer = layouts.Trainer([*argv, "--log-interval", "2"])
    for step in range(4):
        trainer.step([tiny.text_batch(step)], step)
    return processes.output()


def test_a_job_without_pairs_is_told_on_one_rank(demo):
    outputs = processes.run(a_job_without_pairs, 2, [*flags(demo), *PP, "--rsa-weight", "1"])
    said = "WARNING: RSA is on (--rsa-weight 1), but in the last 2 iterations there was no pair"
    assert [output.count(said) for output in outputs] == [0, 2]  # it is the last pipeline stage that knows


def what_attaching_says(argv):
    from megatron.core.utils import unwrap_model

    from rsa_megatron import RSAConfig, RSAPlugin

    (model,) = unwrap_model(layouts.Trainer([*argv, "--rsa-weight", "0"]).model)
    before = dict(vars(model))
    assert RSAPlugin(RSAConfig(weight=0)).attach(model) is model and vars(model) == before
    plugin = RSAPlugin()
    assert plugin.attach([model]) == [model]
    with pytest.raises(ValueError, match="has its hooks already; attach it once"):
        plugin.attach(model)
    with pytest.raises(ValueError, match="pass loss_mask to the model's forward"):
        batch = tiny.batch(0)
        model.rsa_hooks.start_micro_batch(lambda: batch.rsa)
        model(batch.images, batch.tokens, None, None, image_layouts=batch.image_layouts)
    with pytest.raises(ValueError, match="pass labels to its forward"):
        model(batch.images, batch.tokens, None, None, loss_mask=batch.loss_mask, image_layouts=batch.image_layouts)


def test_attaching_says_what_is_wrong(demo):
    processes.run(what_attaching_says, 1, flags(demo))


def test_the_wraps_keep_name_and_signature():
    from rsa_megatron import RSAPlugin

    def model_provider(pre_process=True, post_process=True):
        """Theirs."""

    def forward_step(data_iterator, model):
        """Theirs too."""

    plugin = RSAPlugin()
    for theirs, wrapped in (
        (model_provider, plugin.wrap_model_provider(model_provider)),
        (forward_step, plugin.wrap_forward_step(forward_step)),
    ):
        assert (wrapped.__name__, wrapped.__doc__) == (theirs.__name__, theirs.__doc__)
        assert inspect.signature(wrapped) == inspect.signature(theirs)
