"""Writes down what figures plot, in whatever process draws them: one JSON line a saved figure.

Python imports this module by itself where its folder is in PYTHONPATH. It does nothing unless GOLDEN_FIGURES names a
file. The name in the line is the SHA-256 of the picture, so that the figure can be found again in a page.
"""

import importlib.util
import os
import sys
from pathlib import Path

TARGET = "matplotlib.figure"


def numbers(values):
    """Any array as nested lists of floats; masked and missing values as None."""
    import numpy as np

    def plain(value):
        if isinstance(value, list):
            return [plain(v) for v in value]
        return float(f"{value:.8g}") if value is not None and np.isfinite(value) else None

    return plain(np.ma.filled(np.ma.asarray(values, dtype=float), np.nan).tolist())


def drawn(artist):
    """What one artist shows; None for frames, axes and other furniture."""
    kind = type(artist).__name__
    if hasattr(artist, "get_xdata"):
        return {
            "line": artist.get_label(),
            "x": numbers(artist.get_xdata(False)),
            "y": numbers(artist.get_ydata(False)),
        }
    if hasattr(artist, "get_height") and hasattr(artist, "get_xy"):
        return {"bar": numbers([*artist.get_xy(), artist.get_width(), artist.get_height()])}
    if hasattr(artist, "get_path"):  # steps of a histogram
        return {"patch": artist.get_label(), "path": numbers(artist.get_path().vertices)}
    if hasattr(artist, "get_offsets"):
        shown = artist.get_array()
        return {
            kind: numbers(artist.get_offsets()),
            "paths": [numbers(path.vertices) for path in artist.get_paths()] if kind != "PathCollection" else [],
            "values": None if shown is None else numbers(shown),
        }
    if kind == "AxesImage":
        return {"image": numbers(artist.get_array())}
    return None


def described(ax):
    """Labels, texts and data of one pair of axes."""
    legend = ax.get_legend()
    return {
        "labels": [ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale(), ax.get_yscale()],
        "ticks": [t.get_text() for axis in (ax.xaxis, ax.yaxis) for t in axis.get_ticklabels() if t.get_text()],
        "texts": [text.get_text() for text in ax.texts],
        "legend": [text.get_text() for text in legend.get_texts()] if legend else [],
        "data": [d for d in map(drawn, [*ax.lines, *ax.patches, *ax.collections, *ax.images]) if d],
    }


def picture(target):
    """The bytes that were saved to a path or a stream."""
    if hasattr(target, "getvalue"):
        return target.getvalue()
    return Path(target).read_bytes()


def patch(module):
    """Let every saved figure leave its line."""
    import functools
    import hashlib
    import json

    save = module.Figure.savefig

    @functools.wraps(save)
    def savefig(self, fname, **options):
        result = save(self, fname, **options)
        line = {"picture": hashlib.sha256(picture(fname)).hexdigest(), "axes": [described(ax) for ax in self.axes]}
        with Path(os.environ["GOLDEN_FIGURES"]).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        return result

    module.Figure.savefig = savefig


class Finder:
    """Waits for the import of matplotlib.figure; importing it here would cost every command a second."""

    def find_spec(self, name, path=None, target=None):
        """The usual loader of the module, which patches what it has loaded."""
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("GOLDEN_FIGURES"):
    sys.meta_path.insert(0, Finder())
