import msgspec
import pytest

from ensemble.scheduling.estimates import OutputEstimate


def test_the_whole_output_is_expected_until_requests_have_finished(make_request):
    assert OutputEstimate().num_kv_tokens(make_request(0, 10, max_tokens=100)) == 109


def test_what_requests_used_lately_is_expected_of_the_next(make_request):
    estimate = OutputEstimate()
    for _ in range(500):
        estimate.observe(make_request(0, 10, max_tokens=100), num_output_tokens=25)
    assert estimate.num_kv_tokens(make_request(1, 10, max_tokens=1000)) == pytest.approx(259, abs=2)
    for _ in range(500):
        estimate.observe(make_request(0, 10, max_tokens=100), num_output_tokens=100)
    assert estimate.used_share == pytest.approx(1.0, abs=0.01)


def test_the_first_requests_count_most(make_request):
    estimate = OutputEstimate()
    for _ in range(9):
        estimate.observe(make_request(0, 10, max_tokens=100), num_output_tokens=10)
    assert estimate.used_share == pytest.approx(0.19)


def test_what_is_computed_again_is_expected_to_go_on(make_request):
    estimate = OutputEstimate()
    for _ in range(1000):
        estimate.observe(make_request(0, 10, max_tokens=100), num_output_tokens=25)
    request = msgspec.structs.replace(make_request(1, 10, max_tokens=100), resumed_token_ids=[1] * 60)
    assert estimate.num_kv_tokens(request) == pytest.approx(10 + 60 + 10, abs=1)


def test_no_output_is_expected_to_be_longer_than_any_was(make_request):
    """A client that sets no limit, and so the model's length, must not keep everybody else out."""
    estimate = OutputEstimate()
    unlimited = make_request(0, 10, max_tokens=100_000)
    assert estimate.num_kv_tokens(unlimited) == 10 + estimate.longest - 1 < 1000
    estimate.observe(make_request(1, 10, max_tokens=5000), 5000)
    assert estimate.num_kv_tokens(unlimited) == 10 + 5000 - 1
    for request_id in range(60):  # it is forgotten
        estimate.observe(make_request(request_id, 10, max_tokens=20), 20)
    assert estimate.num_kv_tokens(unlimited) < 1000
