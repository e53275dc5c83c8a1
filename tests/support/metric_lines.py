"""Lines of metrics for tests of what reads them."""

from megatron_v2pe.train.metrics.metrics_log import MetricsLog


class Nothing:
    """A sink that keeps nothing."""

    def write(self, values):
        pass


def line_of(step, **values):
    """What the log reads of a step of one second."""
    return {
        "step": step,
        "loss": 2.12345,
        "grad_norm": 1.234,
        "lr": 5e-6,
        "tokens_per_s": 12345.6,
        "step_s": 1.0,
        "data_s": 0.0,
        "data_s_max": 0.0,
        "data_s_max_rank": 0,
        "save_s": 0.0,
        "comm_wait_s_max": 0.5,
        "straggler": None,
        "straggler_s": None,
        "peak_mem_gib": 34.56,
        **values,
    }


def log_of(*, total_steps, log_every=1):
    return MetricsLog([Nothing()], log_every=log_every, total_steps=total_steps)
