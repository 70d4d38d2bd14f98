"""Notices deprecations that our own calls cause, also where filters hide them."""

import logging
import re
import sys
import warnings
from pathlib import Path

OURS = Path(__file__).resolve().parent.parent
LIBRARIES = ("transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
KINDS = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
HANDED_ON = ("__init__", "__post_init__")  # a subclass's constructor passes on what it gets


def watch(monkeypatch):
    """Start to look; returns a list that grows by "file:line: message"."""
    found = []
    warn = warnings.warn

    def watched_warn(message, category=None, *args, **kwargs):
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, KINDS) and (place := culprit(sys._getframe(1))):
            found.append(f"{place}: {message}")
        return warn(message, category, *args, **kwargs)

    def watched(log):
        def watched_log(self, message, *args, **kwargs):
            said = re.search(r"deprecat|will be removed", str(message))
            if said and (place := culprit(sys._getframe(1))):
                found.append(f"{place}: {message}")
            return log(self, message, *args, **kwargs)

        return watched_log

    monkeypatch.setattr(warnings, "warn", watched_warn)
    for kind in (logging.Logger, logging.LoggerAdapter):
        monkeypatch.setattr(kind, "warning", watched(kind.warning))
    from transformers.utils.logging import warning_once

    warning_once.cache_clear()  # what was said once counts again
    return found


def culprit(frame):
    """Who called what warns: "file:line" of our code, or '' when it was another library.

    frame: where the warning was raised.
    """
    warner = None
    while frame is not None:
        code, module = frame.f_code, frame.f_globals.get("__name__", "")
        package, path = module.split(".")[0], Path(code.co_filename)
        if path.is_relative_to(OURS) and "site-packages" not in path.parts:
            return f"{path.relative_to(OURS).as_posix()}:{frame.f_lineno}"
        if not module.endswith(".logging"):
            warner = warner or package
            if package in LIBRARIES and package != warner and code.co_name not in HANDED_ON:
                return ""
        frame = frame.f_back
    return ""
