"""Defers the parts of torchmetrics that no command needs for its options, which take half of the time of a start.

`import torchmetrics`, as Lightning does, imports metrics of text, audio and images, and with them transformers' models,
scikit-learn and SciPy's signal processing. Lightning and rlmt only use the base classes and the means.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any


def defer_torchmetrics() -> None:
    """Imports the base classes of torchmetrics; the package is executed when another of its names is first used.

    Nothing changes for users of the package: the classes are its own, and all other names are there on first use.
    """
    if "torchmetrics" in sys.modules:
        return
    spec = find_spec("torchmetrics")
    assert spec is not None and spec.loader is not None
    loader, package = spec.loader, module_from_spec(spec)

    def load(name: str) -> Any:
        """A name of the package that is not imported yet."""
        if name.startswith("__") and name != "__all__":  # such as `__wrapped__`, which tools look for in every module
            raise AttributeError(f"module 'torchmetrics' has no attribute {name!r}")
        if package.__dict__.pop("__getattr__", None) is not None:
            loader.exec_module(package)
        return getattr(package, name)

    package._logger = logging.getLogger("torchmetrics")  # type: ignore[attr-defined] # read by its submodules
    sys.modules["torchmetrics"] = package
    import_module("torchmetrics.utilities")  # first: torchmetrics.metric and it import each other
    from torchmetrics.__about__ import __version__
    from torchmetrics.aggregation import MaxMetric, MeanMetric
    from torchmetrics.collections import MetricCollection
    from torchmetrics.metric import Metric

    for kind in (MaxMetric, MeanMetric, Metric, MetricCollection):
        setattr(package, kind.__name__, kind)
    package.__version__ = __version__  # type: ignore[attr-defined] # Lightning compares it
    package.__getattr__ = load  # type: ignore[method-assign]
