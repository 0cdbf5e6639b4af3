"""Charts as SVG, by hand: bars, a line through runs, a flame graph. No library; they read on light and on dark pages."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence

INK, PALE, ACCENT, REST, FLOOR = "#57606a", "#d0d7de", "#d9480f", "#8c959f", "#1f6feb"
FONT = 'font-family="ui-sans-serif,system-ui,sans-serif"'


def _svg(width: int, height: int, title: str, body: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" {FONT} font-size="12">'
    return "\n".join([head, f"<title>{html.escape(title)}</title>", *body, "</svg>", ""])


def _text(x: float, y: float, text: str, *, fill: str = INK, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}" font-size="{size}">{html.escape(text)}</text>'


def bars(title: str, note: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars; ``rows``: (name, value, colour), in this order."""
    width, left, right, step, top = 760, 170, 90, 20, 48
    most = max(value for _, value, _ in rows)
    body = [_text(0, 16, title, size=15), _text(0, 34, note, fill=REST, size=11)]
    for n, (name, value, colour) in enumerate(rows):
        y, long = top + n * step, value / most * (width - left - right)
        body += [
            _text(left - 8, y + 12, name, anchor="end"),
            f'<rect x="{left}" y="{y}" width="{max(long, 1):.1f}" height="15" rx="2" fill="{colour}"/>',
            _text(left + long + 6, y + 12, f"{value:,.0f}"),
        ]
    return _svg(width, top + len(rows) * step + 6, title, body)


def line(title: str, note: str, points: Sequence[tuple[str, float]]) -> str:
    """One value over runs; ``points``: (label, value)."""
    width, height, left, top, bottom = 760, 220, 44, 52, 40
    most = max(value for _, value in points) * 1.15
    gap = (width - left - 20) / max(len(points) - 1, 1)
    spots = [(left + n * gap, height - bottom - v / most * (height - top - bottom)) for n, (_, v) in enumerate(points)]
    body = [_text(0, 16, title, size=15), _text(0, 34, note, fill=REST, size=11)]
    for share in (0.0, 0.5, 1.0):
        y = height - bottom - share * (height - top - bottom)
        body += [
            f'<line x1="{left}" x2="{width - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="{PALE}"/>',
            _text(left - 6, y + 4, f"{share * most:.2f}", anchor="end", size=10),
        ]
    body.append(
        f'<polyline fill="none" stroke="{ACCENT}" stroke-width="2" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in spots)}"/>'
    )
    for (label, value), (x, y) in zip(points, spots, strict=True):
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{ACCENT}"><title>{label}: {value:.2f}</title></circle>'
        )
    body += [_text(spots[0][0], height - 14, points[0][0], size=10)]
    if len(points) > 1:
        body += [_text(spots[-1][0], height - 14, points[-1][0], anchor="end", size=10)]
    return _svg(width, height, title, body)


class _Node:
    __slots__ = ("children", "count")

    def __init__(self) -> None:
        self.count = 0
        self.children: dict[str, _Node] = {}


def flame(title: str, note: str, stacks: Counter[tuple[str, ...]]) -> str:
    """A flame graph, the event loop at the bottom; hover names a frame and its share."""
    root, width, row, top = _Node(), 1180, 17, 48
    for stack, count in stacks.items():
        node = root
        node.count += count
        for frame in stack:
            node = node.children.setdefault(frame.rpartition(":")[0] + ")" if ":" in frame else frame, _Node())
            node.count += count
    deep = _depth(root, root.count)
    height = top + deep * row + 8
    body = [_text(0, 16, title, size=15), _text(0, 34, note, fill=REST, size=11)]
    _draw(root, 0.0, 0, width / root.count, height - 8, root.count, body)
    return _svg(width, height, title, body)


def _depth(node: _Node, total: int) -> int:
    return max((1 + _depth(child, total) for child in node.children.values() if child.count * 400 > total), default=0)


def _draw(node: _Node, x: float, level: int, scale: float, base: float, total: int, body: list[str]) -> None:
    for name, child in sorted(node.children.items()):
        wide = child.count * scale
        if child.count * 400 > total:  # thinner ones would only be lines
            y = base - (level + 1) * 17
            colour = f"hsl({20 + sum(map(ord, name)) % 32},{80 - level % 3 * 6}%,{66 + level % 2 * 5}%)"
            shown = name if len(name) * 6.2 < wide else name[: int(wide / 6.2) - 1] + "…" if wide > 30 else ""
            body.append(
                f"<g><title>{html.escape(name)}: {child.count / total * 100:.1f} %</title>"
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 0.4:.1f}" height="16" fill="{colour}"/>'
                + (_text(x + 3, y + 12, shown, fill="#1f2328", size=10) if shown else "")
                + "</g>"
            )
            _draw(child, x, level + 1, scale, base, total, body)
        x += wide
