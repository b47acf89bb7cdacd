"""Each cache and operator in an AOTInductor package; few packages, as each takes half a minute to compile."""

from tests.modules import cases
from tests.modules.engines import run_everywhere, together


def test_caches_and_operators_are_the_same_in_a_package() -> None:
    subjects = [cases.cached(one) for one in cases.CACHES.values()]
    run_everywhere(*together(*subjects, cases.masked(), cases.table()), engines=["aotinductor"])


def test_rings_are_the_same_in_a_package_that_takes_one_position() -> None:
    subjects = [cases.cached(one, (1,) * 9) for one in (cases.ring(), cases.ring(sink=2))]
    run_everywhere(*together(*subjects), engines=["aotinductor"])
