"""The hook that lets megatron-core run without CUDA: what it changes, and what it must leave alone.

Each body runs in a fresh interpreter, because what counts is the order of imports.
"""

import subprocess
import sys
import textwrap


def run_python(body: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_neither_torch_nor_megatron_core():
    body = """
        import sys, megatron_v2pe
        print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "megatron"}))
    """
    assert run_python(body) == "[]"


def test_megatron_core_is_told_of_a_device_and_user_code_the_truth():
    body = """
        import megatron_v2pe, torch
        names = ("current_device", "synchronize", "Stream", "is_available", "get_rng_state", "manual_seed")
        before = {name: getattr(torch.cuda, name) for name in names}
        factories = (torch.zeros, torch.tensor, torch.empty)
        from megatron.core import parallel_state
        import megatron.core.jit
        assert {name: getattr(torch.cuda, name) for name in names} == before
        assert factories == (torch.zeros, torch.tensor, torch.empty)
        assert not torch.cuda.is_available()
        assert parallel_state.torch is not torch
        assert parallel_state.torch.cuda.current_device() == torch.device("cpu")
        assert parallel_state.torch.zeros(2, device="cuda", pin_memory=True).device.type == "cpu"
        assert parallel_state.torch.zeros(2, device=0).device.type == "cpu"
        assert torch.zeros(2).type() == "torch.FloatTensor"
        import megatron.core.utils as mcore_module
        source = "def kind(x): return x.type(), x.cuda() is x, x.type(torch.float64).dtype"
        exec(source, mcore_module.__dict__)
        assert mcore_module.kind(torch.zeros(1)) == ("torch.cuda.FloatTensor", True, torch.float64)
        try:
            torch.zeros(2).cuda()
        except (RuntimeError, AssertionError):
            print(megatron.core.jit.jit_fuser.__name__)
    """
    assert run_python(body) == "noop_decorator"


def test_tracked_generator_is_the_hosts_and_forking_restores_it():
    body = """
        import megatron_v2pe, torch
        from megatron.core.tensor_parallel import random
        tracker = random.CudaRNGStatesTracker()
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        tracker.add("a", 5)
        with tracker.fork("a"):
            first = torch.rand(2)
        assert torch.equal(torch.rand(2), expected)
        with tracker.fork("a"):
            assert not torch.equal(torch.rand(2), first)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(2), first)
        print("ok")
    """
    assert run_python(body) == "ok"


def test_with_cuda_available_nothing_is_patched():
    body = """
        import sys, megatron_v2pe, torch
        from megatron_v2pe.parallel.runtime import cpu_runtime
        methods = torch.Tensor.type, torch.Tensor.cuda
        torch.cuda.is_available = lambda: True
        torch.cuda.get_device_capability = lambda *a: (9, 0)
        import megatron.core
        from megatron.core import parallel_state, jit
        assert parallel_state.torch is torch
        assert methods == (torch.Tensor.type, torch.Tensor.cuda)
        assert jit.jit_fuser is torch.compile
        assert not any(type(finder).__module__ == cpu_runtime.__name__ for finder in sys.meta_path)
        print(cpu_runtime.is_active())
    """
    assert run_python(body) == "False"


def test_megatron_core_loaded_first_is_patched_in_place():
    body = """
        import sys, torch
        import megatron.core.parallel_state as parallel_state
        assert parallel_state.torch is torch
        import megatron_v2pe
        from megatron_v2pe.parallel.runtime import cpu_runtime
        cpu_runtime.install()
        assert parallel_state.torch is not torch and parallel_state.torch._real is torch
        import megatron.core.models.gpt.gpt_model as gpt
        assert gpt.torch is parallel_state.torch
        print(sum(type(f).__module__ == cpu_runtime.__name__ for f in sys.meta_path))
    """
    assert run_python(body) == "1"


def test_device_of_megatron_core_can_be_meta_for_planning():
    body = """
        import megatron_v2pe, torch
        from megatron_v2pe.parallel.runtime import cpu_runtime
        from megatron.core import parallel_state
        seen = parallel_state.torch
        with cpu_runtime.device_of_mcore("meta"):
            print(seen.cuda.current_device(), seen.empty(1 << 50, device="cuda").device.type)
        print(seen.empty(1, device="cuda").device.type)
    """
    assert run_python(body).split() == ["meta", "meta", "cpu"]
