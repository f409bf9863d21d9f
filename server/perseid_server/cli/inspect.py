"""`perseid inspect`: what a model, an adapter, a gate set or heads hold, and whether they would be accepted."""

from pathlib import Path

from rich.console import Console

from perseid_router.gate_set import CONFIG_FILE as GATES_CONFIG
from perseid_server.adapters.gate_set_file import GateSetInfo
from perseid_server.adapters.inspect import AdapterReport, inspect_adapter
from perseid_server.adapters.layout import kind_of
from perseid_server.adapters.lora import AdapterInfo
from perseid_server.adapters.lora_config import CONFIG_FILE
from perseid_server.adapters.meteora_config import CONFIG_FILE as METEORA_CONFIG
from perseid_server.adapters.source import OPERATOR, resolve_adapter
from perseid_server.cli.heads import accuracy_rows, blocks, lm_head
from perseid_server.errors import NotFound, UnsupportedModel
from perseid_server.model.inspect import ModelReport, inspect_model
from perseid_server.model.source import resolve_model
from perseid_server.speculation.heads_file import HeadsInfo

_MIB = 1 << 20


def inspect(source: str, /, *, model: str = "embedded") -> int:
    """Print a report; returns the exit status.

    Parameters
    ----------
    source
        A .gguf file, a Hugging Face folder, a PEFT folder, a folder with a gate set, a MeteoRA checkpoint or Medusa
        heads, a hub id org/name[@revision], or "embedded".
    model
        The base that an adapter, a gate set or heads are held against.
    """
    console = Console(highlight=False, soft_wrap=True)
    if _is_adapter(source):
        folder = resolve_adapter(source, OPERATOR).path
        from perseid_server.model.checkpoint import open_checkpoint  # noqa: PLC0415  imports torch

        base = open_checkpoint(resolve_model(model)).spec
        report = inspect_adapter(folder, base)
        _print_rows(console, _adapter_rows(report, base.name))
        return 0 if report.accepted else 1
    found = inspect_model(source)
    _print_rows(console, _model_rows(found))
    return 0 if found.accepted else 1


def _is_adapter(source: str) -> bool:
    """A folder with the config of what is loaded beside a base, or a hub id whose repository is not a model."""
    path = Path(source).expanduser()
    if path.exists():
        if not path.is_dir():
            return False
        is_model = (path / "config.json").is_file() and kind_of(path) != "heads"
        return not is_model or any((path / name).is_file() for name in (CONFIG_FILE, GATES_CONFIG, METEORA_CONFIG))
    if source == "embedded":
        return False
    try:
        resolve_model(source)
    except (UnsupportedModel, NotFound):
        return "/" in source
    return False


def _adapter_rows(report: AdapterReport, base: str) -> dict[str, str]:
    rows = {"accepted": f"yes, on {base}" if report.accepted else f"no: {report.reason}"}
    info = report.info
    if info is None:
        return rows
    rows |= _kind_rows(info) | {
        "parameters": f"{info.num_parameters:,}",
        "size": f"{info.nbytes / _MIB:.1f} MiB",
        "trained on": info.trained_on or "not stated",
    }
    return rows | {f"warning {place}": text for place, text in enumerate(info.warnings, 1)}


def _kind_rows(info: AdapterInfo | GateSetInfo | HeadsInfo) -> dict[str, str]:
    match info:
        case AdapterInfo():
            return _lora_rows(info)
        case GateSetInfo():
            return _gate_set_rows(info)
        case HeadsInfo():
            return _heads_rows(info)


def _lora_rows(info: AdapterInfo) -> dict[str, str]:
    return {
        "type": info.kind,
        "rank": f"{info.rank} (pages of adapter memory: {info.num_pages})",
        "targets": ", ".join(info.targets),
        "layers": _ranges(info.layers),
    }


def _gate_set_rows(info: GateSetInfo) -> dict[str, str]:
    return {
        "type": f"{info.kind} ({info.method})",
        "adapters": ", ".join(info.adapters),
        "base": "may be chosen" if info.num_columns > len(info.adapters) else "cannot be chosen",
        "targets": f"{', '.join(info.targets)} in {info.num_layers} layers",
        "router": "chooses for whole requests too" if info.has_request_router else "none for whole requests",
    }


def _heads_rows(info: HeadsInfo) -> dict[str, str]:
    return {
        "type": f"{info.kind} ({info.layout}), {info.num_heads} of {blocks(info.num_layers)}",
        "for": f"adapter {info.adapter}" if info.adapter else "the base",
        "lm_head": lm_head(shared=info.shares_lm_head, num_tokens=info.num_draft_tokens),
        **accuracy_rows(info.accuracy, measured=info.has_accuracy),
    }


def _model_rows(report: ModelReport) -> dict[str, str]:
    def told(value: object, unit: str = "") -> str:
        return "unknown" if value is None else f"{value:,}{unit}" if isinstance(value, int) else f"{value}{unit}"

    types = (f"{one.type} × {one.num_tensors} ({one.num_bytes / _MIB:.1f} MiB)" for one in report.tensor_types)
    return {
        "accepted": "yes" if report.accepted else f"no: {report.reason}",
        "name": report.name,
        "architecture": report.architecture,
        "quantisation": report.quantization,
        "tensors": ", ".join(types),
        "size": f"{report.num_bytes / _MIB:.1f} MiB",
        "parameters": told(report.num_parameters),
        "layers": told(report.num_layers),
        "hidden size": told(report.hidden_size),
        "vocabulary": told(report.vocab_size),
        "context": told(report.context_length, " tokens"),
        "rope scaling": report.rope_scaling or "none",
        "chat template": {None: "unknown", True: "yes", False: "no"}[report.has_chat_template],
    }


def _print_rows(console: Console, rows: dict[str, str]) -> None:
    for name, value in rows.items():
        console.print(f"{name:<14}{value}", markup=False)


def _ranges(numbers: tuple[int, ...]) -> str:
    """0-3, 7: consecutive numbers as ranges."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
