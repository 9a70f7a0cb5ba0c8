"""Python imports this module at start-up when ``mindiesd-run`` put its directory on PYTHONPATH.

It may be read by any Python the user's program starts, so it is written for all of them, and does
nothing in one that mindiesd-run was not installed for. Then it makes way: its directory leaves
sys.path, its name leaves sys.modules, and Python itself imports the user's own sitecustomize.
"""

import os
import sys

_here = os.path.dirname(__file__)
_wanted = os.environ.get("_MINDIESD_PYTHON", "")
_found = ".".join(map(str, sys.version_info[:2])) + ":" + os.path.realpath(sys.prefix)
_problem = ""

if _wanted == _found:
    try:
        __import__("_mindiesd_start").begin()
    except Exception as _error:  # noqa: BLE001 - whatever it is, the user's program must run
        _problem = "mindiesd: could not start, nothing is patched: " + repr(_error)
elif _wanted and not {"_MINDIESD_SESSION", "_MINDIESD_OTHER"} & set(os.environ):
    os.environ["_MINDIESD_OTHER"] = "1"  # once is enough
    _problem = "mindiesd: this Python (" + _found + ") is not the one that mindiesd-run "
    _problem += "belongs to (" + _wanted + "): nothing is patched"

if _problem and sys.stderr:
    sys.stderr.write(_problem + "\n")
    sys.stderr.flush()
if _problem and _wanted == _found and os.environ.get("MINDIESD_STRICT") == "1":
    os._exit(1)

sys.path[:] = [_entry for _entry in sys.path if _entry != _here]
sys.path_importer_cache.pop(_here, None)
sys.modules.pop("sitecustomize", None)
__import__("sitecustomize")
