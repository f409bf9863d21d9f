"""`perseid train`: gates for a user's own adapters, from examples of what each is for; Medusa heads from prompts."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter, validators
from rich.console import Console

from perseid_server.cli.progress import ProgressDisplay
from perseid_server.config import NamedSource
from perseid_server.errors import InvalidRequest

train = App(name="train", help="Train what a server can load.")

_COUNT = validators.Number(gte=1)
_SHARE = validators.Number(gte=0, lt=1)
_Named = Annotated[tuple[str, ...], Parameter(negative=(), consume_multiple=False, show_default=False)]


@train.command
def gates(
    *,
    adapter: _Named,
    data: _Named,
    out: Path,
    model: str = "embedded",
    held_out: _Named = (),
    held_out_share: Annotated[float, Parameter(validator=_SHARE)] = 0.1,
    generic: Annotated[Path | None, Parameter(show_default=False)] = None,
    generic_held_out: Annotated[Path | None, Parameter(show_default=False)] = None,
    steps: Annotated[int, Parameter(validator=_COUNT)] = 300,
    epochs: Annotated[float | None, Parameter(validator=validators.Number(gt=0), show_default=False)] = None,
    seed: int = 0,
    learning_rate: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 1e-3,
    null_weight: Annotated[float, Parameter(validator=validators.Number(gte=0))] = 3.0,
    own_routing: Annotated[float, Parameter(validator=validators.Number(gte=0, lte=1))] = 0.3,
    k: Annotated[int, Parameter(validator=_COUNT)] = 2,
    temperature: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 1.0,
    joint: Annotated[int, Parameter(validator=validators.Number(gte=0))] = 0,
    joint_beta: Annotated[float, Parameter(validator=validators.Number(gte=0))] = 1.0,
    request_router: bool = True,
    float16: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    max_tokens: Annotated[int, Parameter(validator=validators.Number(gte=128))] = 1024,
    checkpoint_every: Annotated[int, Parameter(validator=_COUNT)] = 25,
    resume: bool = False,
    plot: bool = True,
) -> None:
    """Train gates that choose among adapters token by token, and write a gate set that a server can load.

    Each line of a data file is a JSON object: {"prompt", "completion"}, or {"messages"} with answers by the assistant,
    or {"segments": [{"text", "adapter", "train", "answer"}]} for text that several adapters share.

    Parameters
    ----------
    adapter
        NAME=SOURCE of an adapter that gates may choose, a PEFT folder or a hub id. Repeat for each; the order is that
        of the columns.
    data
        NAME=FILE with what adapter NAME is for. Another name is for files with segments. Repeat for more.
    out
        Folder for the gate set and the report.
    model
        The base the adapters are for.
    held_out
        NAME=FILE to judge by, in place of a share of NAME's data. Repeat for more. Default: none.
    held_out_share
        Share of each data file that is kept to judge by.
    generic
        Prompts that the base should answer as it does. Default: 330 that come with Perseid.
    generic_held_out
        Such prompts to judge by. Default: 100 that come with Perseid.
    steps
        Steps of the optimizer, each on some samples of every data set.
    epochs
        Rounds through the largest data file, instead of steps. Default: none.
    seed
        Decides initial gates and the order of the data.
    learning_rate
        The highest, after a warm-up; it ends at zero.
    null_weight
        What tokens of the base count, beside those of one adapter: more sends doubtful tokens to the base.
    own_routing
        Share of the steps, the last ones, in which the gates themselves route the samples they learn from.
    k
        Columns that a gate chooses, unless a request says otherwise.
    temperature
        Of the softmax over the chosen columns, unless a request says otherwise.
    joint
        Steps of a second stage through the whole model, on its own routing; slow, and needs k of 2 or more.
    joint_beta
        What the gates' own loss counts there, beside that of the text.
    request_router
        Also train the router that picks one adapter for a whole request.
    float16
        Write gates in float16: half the size.
    device
        Where to run. "auto" takes a CUDA device when there is one.
    max_tokens
        Longest sample of the data, in tokens.
    checkpoint_every
        Steps from one checkpoint to the next.
    resume
        Go on with the unfinished run in OUT; it ends as it would have.
    plot
        Draw the confusion matrix; needs matplotlib.
    """
    from perseid_router.training.options import TrainingOptions  # noqa: PLC0415  imports torch
    from perseid_server.training.config import GateTraining  # noqa: PLC0415
    from perseid_server.training.report import check_plotting, write_report  # noqa: PLC0415
    from perseid_server.training.run import train_gates  # noqa: PLC0415

    if plot:
        check_plotting()
    config = GateTraining(
        model=model,
        adapters=_adapters(adapter),
        data=tuple((name, Path(file)) for name, file in (_named("data", text) for text in data)),
        out=out,
        held_out=tuple((name, Path(file)) for name, file in (_named("held-out", text) for text in held_out)),
        held_out_share=held_out_share,
        generic=generic,
        generic_held_out=generic_held_out,
        options=TrainingOptions(steps=steps, seed=seed, learning_rate=learning_rate),
        epochs=epochs,
        null_weight=null_weight,
        own_routing=own_routing,
        k=k,
        temperature=temperature,
        joint_steps=joint,
        joint_beta=joint_beta,
        request_router=request_router,
        float16=float16,
        device=device,
        max_tokens=max_tokens,
        checkpoint_every=checkpoint_every,
        resume=resume,
    )
    with ProgressDisplay() as display:
        report = train_gates(config, display.listener())
    write_report(report, out, plot=plot)
    Console(highlight=False, soft_wrap=True).print(
        f"{out}: {report['steps']} steps, {100 * report['accuracy']['all']:.1f} % of decisions right; see report.md"
    )


@train.command
def medusa(
    *,
    prompts: Path,
    out: Path,
    model: str = "embedded",
    adapter: _Named = (),
    heads: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=8))] = 4,
    layers: Annotated[int, Parameter(validator=_COUNT)] = 1,
    draft_vocabulary: Annotated[int, Parameter(validator=validators.Number(gte=0))] = 16_384,
    epochs: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 3.0,
    batch: Annotated[int, Parameter(validator=_COUNT)] = 512,
    learning_rate: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 1e-3,
    softness: Annotated[float, Parameter(validator=validators.Number(gte=0, lte=1))] = 0.9,
    weight_decay: Annotated[float, Parameter(validator=validators.Number(gte=0))] = 0.0,
    seed: int = 0,
    held_out_share: Annotated[float, Parameter(validator=validators.Number(gt=0, lt=1))] = 0.1,
    answer_tokens: Annotated[int, Parameter(validator=validators.Number(gte=2))] = 128,
    max_tokens: Annotated[int, Parameter(validator=validators.Number(gte=128))] = 1024,
    temperature: Annotated[float, Parameter(validator=validators.Number(gte=0))] = 0.0,
    sampled_share: Annotated[float, Parameter(validator=validators.Number(gte=0, lte=1))] = 0.0,
    bfloat16: bool = False,
    cache: Annotated[Path | None, Parameter(show_default=False)] = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    checkpoint_every: Annotated[int, Parameter(validator=_COUNT)] = 100,
    resume: bool = False,
    plot: bool = True,
) -> None:
    """Train Medusa heads on the model's own answers, and write heads that a server can load to draft with.

    Each line of the prompts file is a JSON object: {"prompt"} or {"messages"}, and perhaps {"adapter": NAME} for one
    that an adapter answers. An assistant's content of null in messages is answered by the model first.

    Parameters
    ----------
    prompts
        JSON lines. The more they are like what will be asked, the better the heads.
    out
        Folder for the heads and the report.
    model
        The base the heads are for.
    adapter
        NAME=SOURCE of an adapter that prompts name, a PEFT folder or a hub id. Repeat for each. Where one adapter
        answers every prompt the heads are bound to it; otherwise they are the base's. Default: none.
    heads
        How far the heads see: that many tokens after the next one.
    layers
        Residual layers of a head.
    draft_vocabulary
        Tokens the heads choose among, the most frequent ones of the answers; 0 for all.
    epochs
        Rounds through all positions.
    batch
        Positions of a step.
    learning_rate
        The highest, after a warm-up; it ends at zero.
    softness
        How much the base's own distribution counts beside the token it chose: 0 for tokens alone.
    weight_decay
        AdamW's, times the learning rate.
    seed
        Decides what is held out, the order of the data, and sampled answers.
    held_out_share
        Share of the prompts that is kept to judge by.
    answer_tokens
        Longest answer.
    max_tokens
        Longest prompt with its answer.
    temperature
        Of the answers that are sampled; the others, and those that are held out, are greedy.
    sampled_share
        Share of the prompts whose answers are sampled.
    bfloat16
        Take products with the lm_head in bfloat16: several times faster where the processor has it.
    cache
        Folder that keeps answers and hidden states for further runs. Default: in OUT, removed at the end.
    device
        Where to run. "auto" takes a CUDA device when there is one.
    checkpoint_every
        Steps from one checkpoint to the next.
    resume
        Go on with the unfinished run in OUT; it ends as it would have.
    plot
        Draw accuracy and tokens per step; needs matplotlib.
    """
    from perseid_server.training.medusa.config import HeadsOptions, MedusaTraining  # noqa: PLC0415  imports torch
    from perseid_server.training.medusa.report import write_report  # noqa: PLC0415
    from perseid_server.training.medusa.run import train_medusa  # noqa: PLC0415
    from perseid_server.training.report import check_plotting  # noqa: PLC0415

    if plot:
        check_plotting()
    options = HeadsOptions(
        num_heads=heads,
        num_layers=layers,
        draft_vocabulary=draft_vocabulary,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        softness=softness,
        weight_decay=weight_decay,
        seed=seed,
        bfloat16=bfloat16,
    )
    config = MedusaTraining(
        model=model,
        prompts=prompts,
        out=out,
        adapters=_adapters(adapter),
        options=options,
        held_out_share=held_out_share,
        answer_tokens=answer_tokens,
        max_tokens=max_tokens,
        temperature=temperature,
        sampled_share=sampled_share,
        cache_folder=cache,
        device=device,
        checkpoint_every=checkpoint_every,
        resume=resume,
    )
    with ProgressDisplay() as display:
        report = train_medusa(config, display.medusa_listener())
    write_report(report, out, plot=plot)
    first = ", ".join(f"{100 * of_head[0]:.1f} %" for of_head in report["accuracy"]["all"])
    Console(highlight=False, soft_wrap=True).print(
        f"{out}: {report['steps']} steps, first candidates of the heads right: {first}; see report.md"
    )


def _adapters(texts: tuple[str, ...]) -> dict[str, str]:
    adapters = dict(_named("adapter", text) for text in texts)
    if len(adapters) < len(texts):
        raise InvalidRequest("--adapter: a name is given twice", field="adapter")
    return adapters


def _named(option: str, text: str) -> tuple[str, str]:
    try:
        found = NamedSource.parse(text)
    except ValueError as error:
        raise InvalidRequest(f"--{option}: {error}", field=option) from error
    return found.name, found.source
