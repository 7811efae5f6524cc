"""What Megatron-LM's `pretrain()` asks a GPU for, answered on a CPU; all else is its own.

python tests/support/megatron_on_cpu.py examples/megatron_lm/pretrain_dspark.py ARGUMENTS
"""

import contextlib
import functools
import sys
from pathlib import Path
from unittest import mock


@contextlib.contextmanager
def answers():
    """To whether CUDA is there, which generation of GPUs it is, and to compile functions for it
    ahead. `prepare_megatron()` has answered the rest, as in our loop."""
    from megatron.training import arguments, training

    initialize = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    with (
        mock.patch.object(arguments, "get_device_arch_version", return_value=10),
        mock.patch.object(training, "initialize_megatron", initialize),
        mock.patch.object(training, "set_jit_fusion_options"),
    ):
        yield


def run_script(path):
    """As `python path` does. Not by runpy, which makes the script this process's main module: the
    process that Megatron starts at its first save imports that again."""
    code = compile(Path(path).read_text(encoding="utf-8"), str(path), "exec")
    exec(code, {"__name__": "__main__", "__file__": str(path)})


def main():
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    sys.argv = sys.argv[1:]
    with answers():
        run_script(sys.argv[0])


if __name__ == "__main__":
    main()
