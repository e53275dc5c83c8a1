"""Peak memory of small tapes, worked out by hand."""

from megatron_v2pe.planning.memory.layers.tape import INPUT, Op, moved_bytes, peaks


def test_what_is_read_again_is_kept_once():
    ops = [
        Op(name="a", inputs=(INPUT,), output_bytes=10, keeps=(INPUT,)),
        Op(name="b", inputs=("a",), output_bytes=10, keeps=("a", "b")),
        Op(name="c", inputs=("b",), output_bytes=10, keeps=("b",)),
    ]
    found = peaks(ops, input_bytes=10, keeps_input=True)
    assert found.kept == {INPUT: 10, "a": 10, "b": 10}
    assert peaks(ops, input_bytes=10).kept_bytes == 20
    assert found.forward_bytes == 30  # a, b, c; the input is the caller's


def test_forward_frees_what_nobody_needs():
    ops = [
        Op(name="a", inputs=(INPUT,), output_bytes=10, forward_bytes=5),
        Op(name="b", inputs=("a",), output_bytes=1),
        Op(name="c", inputs=("b",), output_bytes=1),
    ]
    found = peaks(ops, input_bytes=10)
    assert found.inference_bytes == 15  # a and its temporary
    assert found.kept_bytes == 0


def test_a_view_costs_nothing_and_keeps_its_owner():
    ops = [
        Op(name="whole", inputs=(INPUT,), output_bytes=30),
        Op(name="view", inputs=("whole",), view_of="whole", output_bytes=30),
        Op(name="out", inputs=("view",), output_bytes=1, keeps=("view",)),
    ]
    found = peaks(ops, input_bytes=10)
    assert found.kept == {"whole": 30}
    assert found.forward_bytes == 31


def test_backward_holds_kept_tensors_gradients_and_temporaries():
    ops = [
        Op(name="a", inputs=(INPUT,), output_bytes=10, keeps=(INPUT,), backward_bytes=7),
        Op(name="b", inputs=("a",), output_bytes=10, keeps=("a",)),
    ]
    # b: kept a 10 + gradients of b and a 20 = 30; a: gradients of a and input 20 + 7, a is freed
    assert peaks(ops, input_bytes=10).backward_bytes == 30


def test_a_residual_connection_shares_its_gradient():
    ops = [
        Op(name="branch", inputs=(INPUT,), output_bytes=10, keeps=(INPUT,)),
        Op(name="sum", inputs=(INPUT, "branch"), output_bytes=10, passes_gradient=True),
    ]
    # One gradient for sum, branch and input; then the branch's own contribution to the input.
    assert peaks(ops, input_bytes=10).backward_bytes == 20


def test_parts_of_a_gradient_wait_for_each_other():
    ops = [
        Op(name="whole", inputs=(INPUT,), output_bytes=20),
        Op(name="halves", inputs=("whole",), view_of="whole", output_bytes=20),
        Op(name="left", inputs=("halves",), output_bytes=10, gradient_bytes=(10,)),
        Op(name="right", inputs=("halves",), output_bytes=10, gradient_bytes=(10,)),
        Op(name="out", inputs=("left", "right"), output_bytes=10),
    ]
    # At the split: two halves of 10 are put together in a new 20.
    assert peaks(ops, input_bytes=20).backward_bytes == 40


def test_moved_bytes_leave_out_matrix_products():
    ops = [
        Op(name="product", inputs=(INPUT,), output_bytes=8, is_matrix=True),
        Op(name="gate", inputs=("product",), output_bytes=8),
    ]
    forward, backward = moved_bytes(ops, input_bytes=4)
    assert forward == 16
    assert backward == 24  # gradient in, kept input, gradient out
