"""Registration inside the real SGLang: who calls us, what is installed, and what a refusal does.

Each scenario is a new process, as in a server. SGLang swallows a plugin's exceptions, so the
refusals are what matters most here.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from sglang_w4afp8 import __version__

if find_spec("sglang") is None:  # importorskip would import it, for seconds
    pytest.skip("needs the real sglang package", allow_module_level=True)
pytestmark = pytest.mark.sglang

Fresh = Callable[..., subprocess.CompletedProcess[str]]

SGLANG = version("sglang")
REGISTERED = (
    f"sglang-w4afp8 {__version__}: registered quantization 'w4afp8' (sglang {SGLANG}, hooks ok)"
)
# What both refusal scenarios do to SGLang: our loader would never be called in such a release.
BREAK_A_HOOK = """
from sglang_w4afp8 import host_source
_read = host_source.InstalledSource.read
def read(self, module):
    source = _read(self, module)
    return source and source.replace("self._weight_loader_impl(", "self._copy_expert(")
host_source.InstalledSource.read = read
"""
LOAD = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.quantization import get_quantization_config
found = get_quantization_config("w4afp8")
print("CLASS", found.__module__, found.__name__)
"""


def test_entry_point_is_installed() -> None:
    group = entry_points(group="sglang.srt.plugins")
    assert [e.value for e in group if e.name == "w4afp8"] == ["sglang_w4afp8.plugin:register"]


def test_load_plugins_installs_our_class(fresh: Fresh) -> None:
    """Also in a spawned child; and registering again changes and logs nothing."""
    done = fresh(
        """
        import multiprocessing

        def check(where):
            from sglang.srt.configs import model_config
            from sglang.srt.layers import quantization
            from sglang.srt.model_loader import weight_utils
            from sglang_w4afp8 import plugin

            ours = quantization.QUANTIZATION_METHODS["w4afp8"]
            assert ours.__name__ == "ShardedW4AFp8Config", ours
            assert quantization.BASE_QUANTIZATION_METHODS["w4afp8"] is ours
            # The readers: they must see the same object, however they imported it.
            assert model_config.QUANTIZATION_METHODS["w4afp8"] is ours
            assert weight_utils.get_quantization_config("w4afp8") is ours
            assert plugin.status().state == "registered", plugin.status()
            print("OK", where, flush=True)

        def child():
            # What run_scheduler_process does first.
            from sglang.srt.plugins import load_plugins
            load_plugins()
            check("child")

        if __name__ == "__main__":
            from sglang.srt.plugins import load_plugins
            from sglang.srt import platforms
            # Or our imports would force the choice of a platform earlier than SGLang makes it.
            assert platforms._current_platform is not None
            load_plugins()
            check("parent")
            import sglang_w4afp8
            from sglang.srt.layers import quantization
            before = quantization.QUANTIZATION_METHODS["w4afp8"]
            sglang_w4afp8.register()
            assert quantization.QUANTIZATION_METHODS["w4afp8"] is before
            process = multiprocessing.get_context("spawn").Process(target=child)
            process.start()
            process.join()
            assert process.exitcode == 0
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["OK", "parent", "OK", "child"]
    # Once per node, although SGLang has not set logging up yet; the child adds nothing.
    assert done.stderr.count(REGISTERED) == 1, done.stderr


def test_record_is_an_ordinary_one_where_logging_is_set_up(fresh: Fresh) -> None:
    """Also: the filter may name us, and strict mode does not mind success."""
    done = fresh(
        "import logging\n"
        "logging.basicConfig(level=logging.INFO, format='%(levelname)s|%(name)s|%(message)s')\n"
        + LOAD
        + "import sglang_w4afp8; sglang_w4afp8.register()",
        SGLANG_PLUGINS="w4afp8",
        SGLANG_W4AFP8_STRICT="1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[2] == "ShardedW4AFp8Config"
    ours = [line for line in done.stderr.splitlines() if "|sglang_w4afp8" in line]
    assert ours == [f"INFO|sglang_w4afp8.plugin|{REGISTERED}"]


def test_other_plugins_filter_leaves_us_out(fresh: Fresh) -> None:
    done = fresh(LOAD, SGLANG_PLUGINS="somebody_else")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["sglang.srt.layers.quantization.w4afp8", "W4AFp8Config"]
    assert "registered quantization" not in done.stderr


def test_disabled_touches_nothing(fresh: Fresh) -> None:
    done = fresh(
        """
        import sys
        import sglang_w4afp8
        sglang_w4afp8.register()
        from sglang_w4afp8 import plugin
        print(plugin.status().state, "sglang" in sys.modules)
        """,
        SGLANG_W4AFP8_ENABLE="0",
        SGLANG_W4AFP8_STRICT="1",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["disabled", "False"]
    assert "SGLANG_W4AFP8_ENABLE=0, SGLang's own method stays" in done.stderr


def test_mismatch_without_strict_is_one_error_and_the_stock_method(fresh: Fresh) -> None:
    done = fresh(
        "import logging; logging.basicConfig(format='%(levelname)s|%(message)s')\n"
        + BREAK_A_HOOK
        + LOAD
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[2] == "W4AFp8Config"
    assert done.stderr.count("ERROR|") == 1, done.stderr
    for part in (
        f"ERROR|sglang-w4afp8 {__version__}: not registered: sglang {SGLANG}",
        "FusedMoE._weight_loader_physical does not call self._weight_loader_impl() any more",
        "srt/loader.py",
        "(1) pip install",
        "SGLANG_W4AFP8_ENABLE=0",
    ):
        assert part in done.stderr, part
    message = done.stderr[done.stderr.index("ERROR|") :]
    assert len(message.splitlines()) <= 25, "more than one screen"


def test_mismatch_with_strict_ends_the_process(fresh: Fresh) -> None:
    done = fresh(BREAK_A_HOOK + LOAD, SGLANG_W4AFP8_STRICT="1")
    assert done.returncode == 1
    assert "CLASS" not in done.stdout, "load_plugins() went on"
    assert "does not call self._weight_loader_impl() any more" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("found", ["0.5.15.post1", "0.6.0", "0.0.0.dev0"])
def test_version_outside_the_range_is_refused(fresh: Fresh, found: str) -> None:
    done = fresh(
        f"""
        from sglang_w4afp8 import host_source, register
        host_source.InstalledSource._find_version = lambda self: {found!r}
        register()
        print("went on")
        """,
        SGLANG_W4AFP8_STRICT="1",
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"version {found} lies outside the supported range >=0.5.16,<0.6" in done.stderr
    assert len(done.stderr.splitlines()) <= 15, done.stderr


def test_broken_environment_is_a_refusal_too(fresh: Fresh) -> None:
    """What an SGLang whose quantization package cannot be imported ends in."""
    code = """
    import sys
    sys.modules["sglang_w4afp8.srt.install"] = None
    from sglang_w4afp8 import plugin
    plugin.register()
    print(plugin.status().state)
    """
    done = fresh(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"]
    assert "while importing SGLang's quantization" in done.stderr
    assert "sglang-w4afp8 doctor" in done.stderr


def test_runner_reaches_spawned_children_of_any_depth(fresh: Fresh, tmp_path: Path) -> None:
    """With the plugin disabled, which is quick: ``disabled`` too is only set by register()."""
    (tmp_path / "bench_like.py").write_text(
        """
import multiprocessing
import sys

def state():
    from sglang_w4afp8 import plugin
    return str(plugin.status().state)

def rank(index, queue):
    inner = multiprocessing.get_context("spawn").Process(target=grandchild, args=(queue,))
    inner.start()
    inner.join()
    queue.put(f"rank{index}={state()}")

def grandchild(queue):
    queue.put(f"grandchild={state()}")

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=rank, args=(7, queue))
    process.start()
    results = [queue.get(timeout=200), queue.get(timeout=200)]
    process.join()
    assert process.exitcode == 0
    print(f"main={state()}", *results, *sys.argv[1:], __file__.rpartition("/")[2])
"""
    )
    done = fresh(
        args=["-m", "sglang_w4afp8.run", "bench_like", "--tp", "8"], SGLANG_W4AFP8_ENABLE="0"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "main=disabled",
        "grandchild=disabled",
        "rank7=disabled",
        "--tp",
        "8",
        "bench_like.py",
    ]
    assert done.stderr.count("SGLang's own method stays") == 1, done.stderr


def test_runner_registers_and_a_spawned_child_too(fresh: Fresh, tmp_path: Path) -> None:
    """For real; SGLang's one-batch benchmark spawns its ranks like this."""
    (tmp_path / "bench_like.py").write_text(
        """
import multiprocessing

def rank():
    from sglang.srt.layers.quantization import get_quantization_config
    print(get_quantization_config("w4afp8").__name__, flush=True)

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=rank)
    process.start()
    process.join()
    rank()
"""
    )
    done = fresh(args=["-m", "sglang_w4afp8.run", "bench_like"], SGLANG_W4AFP8_STRICT="1")
    assert done.stdout.split() == ["ShardedW4AFp8Config"] * 2, done.stderr
    assert done.stderr.count(REGISTERED) == 1, done.stderr


def test_runner_refuses_to_go_on_without_the_plugin(fresh: Fresh, tmp_path: Path) -> None:
    (tmp_path / "must_not_run.py").write_text("print('ran')")
    done = fresh(args=["-m", "sglang_w4afp8.run", "must_not_run"], SGLANG_W4AFP8_ENABLE="maybe")
    assert (done.returncode, done.stdout) == (1, "")
    assert "SGLANG_W4AFP8_ENABLE='maybe'" in done.stderr


def test_runner_names_a_module_that_is_not_there(fresh: Fresh) -> None:
    done = fresh(args=["-m", "sglang_w4afp8.run", "bench_nothing"], SGLANG_W4AFP8_ENABLE="0")
    assert done.returncode == 1
    assert "there is no module 'bench_nothing'" in done.stderr


def test_unreadable_strict_counts_as_strict(fresh: Fresh) -> None:
    done = fresh(
        "import sglang_w4afp8; sglang_w4afp8.register(); print('went on')",
        SGLANG_W4AFP8_ENABLE="maybe",
        SGLANG_W4AFP8_STRICT="true",
    )
    assert (done.returncode, done.stdout) == (1, "")
