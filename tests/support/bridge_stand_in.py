"""A stand-in for what of Megatron-Bridge the plugin meets, as Bridge cannot be imported without Transformer Engine.

Each class says what of Bridge's source it stands for: a provider with pre-wrap hooks that are given the list of chunks; a model
that holds the LLaVAModel and has a config of its own; a forward step that takes the global state first, whose loss function is
given LLaVAModel's two outputs; a training loop that looks at the step's signature to know whether to give it the state. It
shows that the plugin fits these forms. That Bridge is of these forms it cannot show.
"""

import copy
import importlib.util
import inspect
import sys
from functools import partial

from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from tests.support import processes


class GlobalState:
    """Bridge's, of which the step reads nothing here."""


class WrapperModel(MegatronModule):
    """As NemotronVLModel: the schedules read this module's config, the LLaVAModel has a copy."""

    def __init__(self, llava_model):
        super().__init__(config=copy.deepcopy(llava_model.config))
        self.llava_model = llava_model
        # NemotronVLModel has none of these, and trains on one stage; Megatron's loop asks for them, with several.
        for name in ("pg_collection", "pre_process", "post_process", "share_embeddings_and_output_weights"):
            setattr(self, name, getattr(llava_model, name))

    def set_input_tensor(self, input_tensor):
        self.llava_model.set_input_tensor(input_tensor)

    def forward(self, *args, **kwargs):
        return self.llava_model(*args, **kwargs)


class Provider:
    """As ModelProviderMixin: hooks on the chunks before they are wrapped, each given what the one before returned."""

    def __init__(self, build_llava):
        self._build_llava, self._pre_wrap_hooks = build_llava, []

    def register_pre_wrap_hook(self, hook):
        self._pre_wrap_hooks.append(hook)

    def provide_for_megatron(self, *args, **kwargs):
        model = [WrapperModel(self._build_llava(*args, **kwargs))]
        for hook in self._pre_wrap_hooks:
            model = hook(model)
        return model[0]


def bridge_step(job, state: GlobalState, data_iterator, model, return_schedule_plan: bool = False):
    assert isinstance(state, GlobalState) and not return_schedule_plan
    output, loss_func = job.plain_forward_step(data_iterator, model)
    if not unwrap_model(model).llava_model.post_process:
        return output, loss_func
    # Both outputs of the model, as llava_step gives them on.
    return (output, loss_func.args[0]), lambda outputs: job.loss_func(outputs[1], outputs[0])


class Functor:
    """A step that is an object, which Bridge takes as well: it has no __name__."""

    def __init__(self, job):
        self._job = job

    def __call__(self, state: GlobalState, data_iterator, model, return_schedule_plan: bool = False):
        return bridge_step(self._job, state, data_iterator, model, return_schedule_plan)


def step_of_form(job, form):
    if form == "functor":
        return Functor(job)

    def forward_step(state, data_iterator, model, return_schedule_plan=False):
        return bridge_step(job, state, data_iterator, model, return_schedule_plan)

    return forward_step


def with_state(step):
    """As Bridge's training loop: by an annotation, or else by the first parameter's name."""
    parameters = inspect.signature(step).parameters
    annotated = any(parameter.annotation is GlobalState for parameter in parameters.values())
    assert annotated or next(iter(parameters)) == "state", f"{step} would not be given the state"
    return partial(step, GlobalState())


def load_job(file):
    """A script of examples/existing_jobs as a module of its own."""
    spec = importlib.util.spec_from_file_location("job", file)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    return job


def train(job_file, form: str, flags: list[str]) -> str:
    """Run the Megatron-LM job with its model and its step in Bridge's forms; what it printed."""
    job = load_job(job_file)
    # What functools.wraps keeps: the job's own functions, without RSA.
    job.plain_forward_step = inspect.unwrap(job.forward_step)
    provider = Provider(inspect.unwrap(job.model_provider))
    provider.register_pre_wrap_hook(job.rsa.attach)
    job.model_provider = provider.provide_for_megatron
    job.forward_step = with_state(job.rsa.wrap_forward_step(step_of_form(job, form)))
    sys.argv = [str(job_file), *flags]
    job.main()
    return processes.output()
