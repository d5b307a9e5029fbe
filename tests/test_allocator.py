"""What is freed stays with the process: large tensors come from pages that it has."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from symbiotic.allocator import keep_freed_memory

{keep}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults() for _ in range(10)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_tenth_of_ten_tensors_of_64_mb_needs_no_new_page() -> None:
    def faults(keep: str) -> int:
        program = PROGRAM.format(keep=keep)
        return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)

    assert faults("keep_freed_memory()") < 20
    assert faults("") > 20  # the instrument sees pages, huge ones too
