"""A plan as one self-contained page: memory bars, and a map of layers and tensors coloured by device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from hybrid.cli.plan_text import machine_line, prediction_line
from hybrid.cli.table import format_bytes
from hybrid.placement.capabilities import kind_of
from hybrid.placement.memory import DeviceMemory, Model, Tensor
from hybrid.placement.plan import Placement, Plan
from hybrid.placement.report import by_role, by_rule, stored

# The CPU first, then GPUs in their order; told apart by people who see no red or no green too.
_CPU_COLOUR = "#4c78a8"
_GPU_COLOURS = ("#f2a03d", "#c65b7c", "#6aa84f", "#8e6bbf", "#b8a23a", "#2a9d9d", "#a5673f", "#7a7a7a")

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --dim: #65707e; --paper: #fbfaf7; --line: #dcd9d0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --dim: #98a2ae; --paper: #15191f; --line: #313944; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1080px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .dim { color: var(--dim); }
.speed { display: flex; gap: 3rem; margin: 1.4rem 0 .4rem; }
.speed b { font-size: 2.1rem; line-height: 1; }
.bar { display: flex; height: 1.7rem; border-radius: 5px; overflow: hidden; background: var(--line); }
.bar i { display: block; } .device { margin: 1rem 0; }
.device p { display: flex; justify-content: space-between; }
.cache { filter: brightness(.75); } .working { opacity: .45; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--dim); font-size: .85rem; }
th, td { padding: .22rem .8rem .22rem 0; border-bottom: 1px solid var(--line); }
.n { text-align: right; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--dim); font: 10px system-ui, sans-serif; }
.key span { margin-right: 1.4rem; }
.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px;
  margin-right: .4rem; vertical-align: -1px; }
.warning { border-left: 3px solid #d9822b; padding-left: .8rem; }
"""

_CELL, _PITCH, _LEFT, _TOP = 14, 16, 130, 18


def page(model: Model, plan: Plan, title: str) -> str:
    """The whole page, UTF-8 text. Names of the file and of rules are escaped."""
    colours = colours_of(plan)
    body = "\n".join(_body(model, plan, title, colours))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}: plan</title><style>{_STYLE}</style></head><body>\n{body}\n</body></html>"
    )


def colours_of(plan: Plan) -> dict[str, str]:
    """Device -> colour."""
    others = [name for name in dict.fromkeys((*plan.memory, *plan.devices)) if kind_of(name) != "cpu"]
    colours = {name: _GPU_COLOURS[i % len(_GPU_COLOURS)] for i, name in enumerate(others)}
    return {"cpu": _CPU_COLOUR, **colours}


def _body(model: Model, plan: Plan, title: str, colours: dict[str, str]) -> Iterator[str]:
    size = plan.size
    yield f"<h1>{escape(title)}</h1>"
    yield (
        f'<p class="dim">context {size.max_model_len} · {size.max_num_seqs} at once'
        f" · cache {escape(size.kv_format)} · {escape(machine_line(plan))}</p>"
    )
    if plan.prediction is not None:
        yield (
            f'<div class="speed"><p><b>{plan.prediction.decode_tps:.3g}</b> tokens/s decoding</p>'
            f"<p><b>{plan.prediction.prefill_tps:.3g}</b> tokens/s of prompt</p></div>"
        )
    yield f'<p class="dim">{escape(prediction_line(plan))}</p>'
    if plan.expert_cache is not None:
        yield f'<p class="dim">{escape(str(plan.expert_cache))}</p>'
    yield from (f'<p class="warning">{escape(warning)}</p>' for warning in plan.warnings)
    yield "<h2>Memory</h2>"
    for memory in plan.memory.values():
        yield _bar(memory, colours[memory.device])
    yield '<p class="dim">Full colour: weights; darker: KV cache; pale: working memory; grey: free.</p>'
    yield "<h2>Layers and tensors</h2>"
    yield _key(colours, plan)
    yield _map(model, plan, colours)
    yield "<h2>Roles</h2>"
    yield _role_table(model, plan)
    yield "<h2>Rules</h2>"
    yield _rule_table(model, plan)


def _role_table(model: Model, plan: Plan) -> str:
    rows = []
    for s in by_role(model, plan):
        sizes = format_bytes(s.n_bytes), format_bytes(s.active_bytes)
        rows.append((s.role, s.device, s.num_tensors, *sizes, ", ".join(s.formats)))
    return _table(("role", "device", "tensors", "bytes", "a token reads", "formats"), rows, (2, 3, 4))


def _rule_table(model: Model, plan: Plan) -> str:
    rows = [
        (s.rule, ", ".join(s.devices), s.num_tensors, format_bytes(s.n_bytes)) for s in by_rule(model, plan)
    ]
    return _table(("rule", "devices", "tensors", "bytes"), rows, (2, 3))


def _bar(memory: DeviceMemory, colour: str) -> str:
    budget = max(memory.budget_bytes or 0, memory.total_bytes, 1)
    parts = (
        ("weights", memory.weights_bytes),
        ("cache", memory.kv_cache_bytes),
        ("working", memory.scratch_bytes),
    )
    pieces = "".join(
        f'<i class="{name}" style="width:{n_bytes / budget:.3%};background:{colour}"'
        f' title="{name}: {format_bytes(n_bytes)}"></i>'
        for name, n_bytes in parts
    )
    stated = "unknown" if memory.budget_bytes is None else format_bytes(memory.budget_bytes)
    words = " + ".join(f"{format_bytes(n_bytes)} {name}" for name, n_bytes in parts if n_bytes)
    return (
        f'<div class="device"><p><strong>{escape(memory.device)}</strong><span class="dim">'
        f"{words} = {format_bytes(memory.total_bytes)} of {stated}</span></p>"
        f'<div class="bar">{pieces}</div></div>'
    )


def _key(colours: dict[str, str], plan: Plan) -> str:
    items = "".join(
        f'<span><i style="background:{colour}"></i>{escape(device)}</span>'
        for device, colour in colours.items()
        if device in plan.devices
    )
    return f'<p class="key">{items}</p>'


def _map(model: Model, plan: Plan, colours: dict[str, str]) -> str:
    """Rows are kinds of tensors, the largest first; columns are layers, after one for tensors of none."""
    kinds: dict[str, list[tuple[Tensor, Placement]]] = {}
    for tensor, placement in stored(model, plan):
        kind = tensor.name if tensor.layer is None else tensor.name.split(".", 2)[2]
        kinds.setdefault(kind.rsplit(".", 1)[0], []).append((tensor, placement))
    order = sorted(kinds, key=lambda kind: -sum(placement.n_bytes for _, placement in kinds[kind]))
    columns = {layer: (index + 1.5) * _PITCH for index, layer in enumerate(model.dims.layers)}
    largest = max((placement.n_bytes for row in kinds.values() for _, placement in row), default=1) or 1
    parts = [
        f'<text x="{_LEFT + x + _CELL / 2}" y="12" text-anchor="middle">{layer}</text>'
        for layer, x in columns.items()
        if layer % 5 == 0
    ]
    for index, kind in enumerate(order):
        y = _TOP + index * _PITCH
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 11}" text-anchor="end">{escape(kind)}</text>')
        for tensor, placement in kinds[kind]:
            x = _LEFT + columns.get(-1 if tensor.layer is None else tensor.layer, 0)
            opacity = 0.35 + 0.65 * (placement.n_bytes / largest) ** 0.25
            parts.append(_cell(x, y, tensor, placement, colours[placement.device], opacity))
    width, height = _LEFT + (len(columns) + 1.5) * _PITCH, _TOP + len(order) * _PITCH
    label = 'role="img" aria-label="layers and tensors by device"'
    return f'<svg viewBox="0 0 {width} {height}" {label}>{"".join(parts)}</svg>'


def _cell(x: float, y: int, tensor: Tensor, placement: Placement, colour: str, opacity: float) -> str:
    words = (
        f"{tensor.name}: {placement} by {placement.rule}, "
        f"{placement.format or tensor.info.type.name}, {format_bytes(placement.n_bytes)}"
    )
    return (
        f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" rx="2" fill="{colour}" '
        f'fill-opacity="{opacity:.2f}"><title>{escape(words)}</title></rect>'
    )


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]], numbers: tuple[int, ...]) -> str:
    def cells(tag: str, values: tuple[object, ...]) -> str:
        return "".join(
            f"<{tag}{' class=n' if index in numbers else ''}>{escape(str(value))}</{tag}>"
            for index, value in enumerate(values)
        )

    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', header)}</tr>{lines}</table>"
