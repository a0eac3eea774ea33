import gc

import pytest

from batchcls.pipeline.fused_actor import collector_at_rest


def test_nothing_is_collected_meanwhile_and_what_came_is_left_alone_afterwards():
    before = gc.get_freeze_count()
    try:
        with collector_at_rest():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_an_engine_that_cannot_start_leaves_the_collector_at_work():
    try:
        with pytest.raises(ZeroDivisionError), collector_at_rest():
            raise ZeroDivisionError
        assert gc.isenabled()
    finally:
        gc.unfreeze()
