"""The architecture, drawn by code: the backbone with its hook, and what each variant puts there.

Coordinates are inches on the page. Sizes in the drawing are the defaults (128 bands, 1,024 frames,
12 x 101 patches, 12 blocks, width 768).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from utils.figures import style

_HEIGHT = 4.5  # inch
_AUDIO, _META, _PLAIN = "#DCEBF5", "#FBEBCC", "#F2F2F2"  # pale blue, pale orange, pale grey
_EDGE = "#404040"
_SMALL, _TEXT = 6.0, 6.8  # pt
_FACTORS = (("device", style.BLUE), ("site", style.ORANGE), ("rest", style.GREEN))


def architecture_figure() -> Figure:
    """Panel (a): spectrogram to logits with the modulation hook; (b)-(e): the four variants."""
    figure = style.new_figure(style.PAGE, _HEIGHT)
    figure.set_layout_engine("none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, style.PAGE), ylim=(0, _HEIGHT))
    axis.axis("off")
    _backbone(axis)
    for i, (title, draw) in enumerate(
        (("GRF-AST", _grf), ("FiLM-AST", _film), ("TAFiLM-AST", _tafilm), ("SoftFiLM-AST", _soft))
    ):
        x = 0.06 + i * 1.78
        _box(axis, x, 0.05, 1.7, 1.86, "", colour="white", edge="#BFBFBF")
        axis.text(
            x + 0.07, 1.83, f"({'bcde'[i]}) {title}", fontsize=7.5, fontweight="bold", va="top"
        )
        draw(axis, x + 0.85)
    return figure


def _backbone(axis: Axes) -> None:
    y = 2.95  # the line on which the sound travels
    axis.text(0.06, 4.45, "(a) Audio Spectrogram Transformer and its two hooks", fontsize=7.5,
              fontweight="bold", va="top")  # fmt: skip
    _spectrogram(axis, 0.08, y - 0.31, 0.86, 0.62)
    _label(axis, 0.51, y - 0.38, "log-mel, 128 bands\n× 1,024 frames", va="top")
    _arrow(axis, (0.94, y), (1.1, y))
    _box(axis, 1.1, y - 0.3, 0.68, 0.6, "patches\n16 × 16\nstride 10", _AUDIO)
    _label(axis, 1.44, y - 0.38, "linear embedding\n+ positions", va="top")
    _arrow(axis, (1.78, y), (1.94, y))
    _tokens(axis, 1.94, y)
    _arrow(axis, (2.34, y), (2.65, y))

    _box(axis, 2.48, 2.36, 2.98, 1.05, "", "none", dashed=True)
    _label(axis, 5.41, 2.39, "× 12 blocks", ha="right", va="bottom", size=_TEXT)
    modulate = _block(axis, 2.65, y)
    _arrow(axis, (5.35, y), (5.55, y))
    _box(axis, 5.55, y - 0.3, 0.54, 0.6, "LN\n" + r"$\frac{1}{2}$(CLS" + "\n+ DIST)", _AUDIO)
    _arrow(axis, (6.09, y), (6.2, y))
    _plus(axis, 6.27, y, _META)
    _arrow(axis, (6.34, y), (6.46, y))
    _box(axis, 6.46, y - 0.3, 0.62, 0.6, "head\n768 → 64\n→ logits", _AUDIO)
    _label(axis, 6.77, y - 0.38, "crackle, wheeze\n(or abnormal)", va="top")
    _label(axis, 5.82, y - 0.38, "pooled $h$", va="top")
    _metadata(axis, modulate, y)


def _block(axis: Axes, x: float, y: float) -> float:
    """One transformer block from x = 2.65 to 5.35 inch; returns the middle of the hook."""
    gap, plus, modulate = 0.08, [], 0.0
    for name, width, colour in (
        ("LN 1", 0.3, _AUDIO), ("attention", 0.5, _AUDIO), ("+", 0.14, ""), ("LN 2", 0.3, _AUDIO),
        ("modulate", 0.52, _META), ("MLP", 0.32, _AUDIO), ("+", 0.14, ""),
    ):  # fmt: skip
        if name == "+":
            plus.append(x + width / 2)
            _plus(axis, plus[-1], y)
        else:
            _box(axis, x, y - 0.17, width, 0.34, name, colour)
        if name == "modulate":
            modulate = x + width / 2
        x += width + gap
        if len(plus) < 2:
            _arrow(axis, (x - gap, y), (x, y))
    _skip(axis, 2.56, plus[0], y)
    _skip(axis, plus[0] + 0.11, plus[1], y)
    return modulate


def _metadata(axis: Axes, modulate: float, y: float) -> None:
    """The metadata line above the backbone, down to the two hooks."""
    top = 4.02
    for i, (colour, text, encoder) in enumerate((
        (style.BLUE, "device\n4 + unknown", "embedding, 8"),
        (style.ORANGE, "site\n7 + unknown", "embedding, 8"),
        (style.GREEN, "age, BMI,\nduration", "z-score, 3"),
    )):  # fmt: skip
        x = 0.62 + i * 0.86
        _box(axis, x, top - 0.15, 0.78, 0.32, text, _META, edge=colour, width=1.0)
        _label(axis, x + 0.39, top - 0.2, encoder, va="top", colour=colour)
    _label(axis, 0.53, top, "metadata", ha="right")
    _box(axis, 0.57, top - 0.36, 2.62, 0.58, "", "none", edge="#BFBFBF")
    _arrow(axis, (3.19, top), (modulate - 0.42, top))
    _box(axis, modulate - 0.42, top - 0.17, 0.84, 0.34, "conditioner", _META)
    _arrow(axis, (modulate, top - 0.17), (modulate, y + 0.17), colour=style.VERMILLION)
    hook = "per block: scale $\\gamma_l$,\nshift $\\beta_l$  (c, d, e)"
    _label(axis, modulate + 0.05, 3.62, hook, ha="left", colour=style.VERMILLION)
    axis.plot([modulate + 0.42, 6.27], [top, top], color=style.VERMILLION, linewidth=0.9)
    _arrow(axis, (6.27, top), (6.27, y + 0.07), colour=style.VERMILLION)
    _label(axis, 6.32, 3.62, "once, after the\ntransformer (b)", ha="left", colour=style.VERMILLION)


def _grf(axis: Axes, x: float) -> None:
    _chain(axis, x, (r"$m$ = [device; site; rest]", "MLP, LN"))
    _arrow(axis, (x, 0.98), (x, 0.79))
    _label(axis, x + 0.05, 0.9, "$m'$, 768", ha="left")
    _plus(axis, x, 0.72, _META)
    _arrow(axis, (x - 0.62, 0.72), (x - 0.07, 0.72))
    _arrow(axis, (x + 0.07, 0.72), (x + 0.62, 0.72))
    _label(axis, x - 0.6, 0.75, "$h$", va="bottom", size=_TEXT)
    _label(axis, x + 0.6, 0.75, r"$\tilde{h}$", va="bottom", size=_TEXT)
    _formula(axis, x, r"$\tilde{h} = h + g\,m'$", "$g$: one learned gate, starts at 0.5")


def _film(axis: Axes, x: float) -> None:
    _chain(axis, x, (r"$m$ = [device; site; rest]", "encoder, 64"))
    _arrow(axis, (x, 0.98), (x, 0.86))
    _strip(axis, x, [style.VERMILLION] * 9)
    _formula(
        axis, x, r"$u \leftarrow (1+\Delta\gamma_l)\odot u + \beta_l$", "one generator per block"
    )


def _tafilm(axis: Axes, x: float) -> None:
    _chain(axis, x, (r"$m$ = [device; site; rest]", "encoder, 64"))
    _arrow(axis, (x, 0.98), (x - 0.5, 0.86), colour=style.PURPLE)
    _arrow(axis, (x, 0.98), (x + 0.16, 0.86), colour=style.VERMILLION)
    _strip(axis, x, [style.PURPLE] * 2 + [style.VERMILLION] * 7)
    _formula(
        axis, x, r"$u \leftarrow (1+\Delta\gamma_l^{c|p})\odot u + \beta_l^{c|p}$",
        "two generators per block: $c$, $p$",
    )  # fmt: skip


def _soft(axis: Axes, x: float) -> None:
    for i, (name, colour) in enumerate(_FACTORS):
        left = x - 0.79 + i * 0.54
        _box(axis, left, 1.4, 0.5, 0.2, name, _META, edge=colour, width=1.0)
        _arrow(axis, (left + 0.25, 1.4), (left + 0.25, 1.31), colour=colour)
        _box(axis, left, 1.11, 0.5, 0.2, "enc., 64", _META, edge=colour)
        _arrow(axis, (left + 0.25, 1.11), (left + 0.25, 1.0), colour=colour)
        _mask(axis, left + 0.02, 0.78, 0.46, 0.2, i, colour)
    _label(axis, x, 0.735, "soft masks over the 768 features", va="top")
    for y, formula in (
        (0.51, r"$\gamma_l = 1+\Sigma_k\,w_k\odot\Delta\gamma_{k,l}$"),
        (0.34, r"$\beta_l = \Sigma_k\,w_k\odot\beta_{k,l}$"),
    ):
        axis.text(x, y, formula, fontsize=7, ha="center", va="center")
    _label(axis, x, 0.16, r"$w_k = \sigma(a_k/\tau)$, $a_k$ learned")


def _chain(axis: Axes, x: float, texts: Sequence[str]) -> None:
    """Two boxes of a variant's encoder, from top to bottom."""
    _box(axis, x - 0.75, 1.4, 1.5, 0.2, texts[0], _META)
    _arrow(axis, (x, 1.4), (x, 1.2))
    _box(axis, x - 0.42, 0.98, 0.84, 0.22, texts[1], _META)


def _strip(axis: Axes, x: float, colours: Sequence[str]) -> None:
    """Tokens side by side, coloured by the generator that modulates them."""
    size, split = 0.15, len(set(colours)) > 1
    left = x - size * len(colours) / 2
    for i, colour in enumerate(colours):
        axis.add_patch(Rectangle((left + i * size, 0.7), size * 0.88, 0.15, facecolor=colour,
                                 alpha=0.45, edgecolor=colour))  # fmt: skip
    _label(axis, left + size, 0.68, "CLS,\nDIST" + " ($c$)" * split, va="top", size=5.5)
    _label(axis, left + 5.5 * size, 0.68, "1,212 patches" + " ($p$)" * split, va="top", size=5.5)


def _formula(axis: Axes, x: float, formula: str, note: str) -> None:
    axis.text(x, 0.36, formula, fontsize=7.5, ha="center", va="center")
    _label(axis, x, 0.14, note)


def _mask(axis: Axes, x: float, y: float, width: float, height: float, own: int, colour) -> None:
    """A soft mask: high on its own third of the features, low elsewhere."""
    t = np.linspace(0, 1, 60)
    value = 0.12 + 0.76 / (1 + np.exp(-40 * (t - own / 3))) / (1 + np.exp(40 * (t - (own + 1) / 3)))
    axis.fill_between(x + t * width, y, y + value * height, color=colour, alpha=0.45, linewidth=0)
    axis.plot([x, x + width], [y, y], color=_EDGE, linewidth=0.5)


def _spectrogram(axis: Axes, x: float, y: float, width: float, height: float) -> None:
    """A drawn spectrogram (two breaths, one wheeze), not a recording."""
    t, f = np.meshgrid(np.linspace(0, 1, 120), np.linspace(0, 1, 40))
    breath = np.exp(-(((t % 0.5) - 0.22) ** 2) / 0.012) * np.exp(-2.2 * f)
    wheeze = 0.7 * np.exp(-((f - 0.32 - 0.05 * np.sin(9 * t)) ** 2) / 6e-4) * (t % 0.5 > 0.2)
    noise = 0.08 * np.random.default_rng(0).random(t.shape)
    image = breath + wheeze * np.exp(-(((t % 0.5) - 0.3) ** 2) / 0.006) + noise
    axis.imshow(image, extent=(x, x + width, y, y + height), origin="lower", aspect="auto",
                cmap="magma", zorder=1)  # fmt: skip
    axis.set(xlim=(0, style.PAGE), ylim=(0, _HEIGHT))
    axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=_EDGE, linewidth=0.5))


def _tokens(axis: Axes, x: float, y: float) -> None:
    names = ("CLS", "DIST", "1", "2", "⋮", "1,212")
    for i, name in enumerate(names):
        colour = style.PURPLE if i < 2 else style.VERMILLION
        bottom = y + 0.39 - (i + 1) * 0.13
        if name != "⋮":
            axis.add_patch(Rectangle((x, bottom), 0.4, 0.115, facecolor=colour, linewidth=0.5,
                                     alpha=0.3, edgecolor=colour))  # fmt: skip
        axis.text(x + 0.2, bottom + 0.055, name, fontsize=5.5, ha="center", va="center")
    _label(axis, x + 0.2, y - 0.42, "tokens, 768", va="top")


def _box(
    axis: Axes, x: float, y: float, w: float, h: float, text: str, colour: str = _PLAIN,
    *, edge: str = _EDGE, width: float = 0.6, dashed: bool = False,
) -> None:  # fmt: skip
    axis.add_patch(
        FancyBboxPatch(
            (x + 0.02, y + 0.02), w - 0.04, h - 0.04, boxstyle="round,pad=0.02,rounding_size=0.03",
            facecolor=colour, edgecolor=edge, linewidth=width, linestyle="--" if dashed else "-",
        )
    )  # fmt: skip
    axis.text(x + w / 2, y + h / 2, text, fontsize=_SMALL, ha="center", va="center")


def _label(axis: Axes, x: float, y: float, text: str, *, ha="center", va="center",
           size: float = _SMALL, colour: str = "#303030") -> None:  # fmt: skip
    axis.text(x, y, text, fontsize=size, ha=ha, va=va, color=colour, linespacing=1.15)


def _arrow(axis: Axes, start, end, *, colour: str = _EDGE) -> None:
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=5, linewidth=0.8, color=colour,
                        shrinkA=0, shrinkB=0)
    )  # fmt: skip


def _plus(axis: Axes, x: float, y: float, colour: str = "white") -> None:
    axis.add_patch(Circle((x, y), 0.07, facecolor=colour, edgecolor=_EDGE, linewidth=0.7, zorder=3))
    axis.text(x, y - 0.003, "+", fontsize=7, ha="center", va="center", zorder=4)


def _skip(axis: Axes, start: float, end: float, y: float) -> None:
    """Residual connection below the chain, from `start` to the sum at `end`."""
    low = y - 0.3
    axis.plot([start, start, end], [y, low, low], color=_EDGE, linewidth=0.8)
    _arrow(axis, (end, low), (end, y - 0.07))
