import logging, time
from tests.compiler import tiny
def show(tag):
    l=logging.getLogger("torch.__trace"); print(tag, l.handlers, l.propagate, l.level, logging.getLogger().handlers, logging.getLogger("torch").level)
def cap(tag, passes=tiny.DEFAULT_PASSES):
    t=time.time(); c=tiny.captured(tiny.tiny(layers=1),passes); print(tag,'capture',round(time.time()-t,2)); return c
def test_a(tmp_path):
    show('start'); c=cap(1); show('after capture'); cap(2)
    from triptych.compiler import storage
    storage.save(c.program,tmp_path/'p'); show('after save'); cap(3)
    storage.load(tmp_path/'p'); show('after load'); cap(4)
    cap('q',"quantize{recipe=8da4w},static-kv-cache,swap-sdpa"); show('after q'); cap(5); cap(6)
    import cProfile,pstats
    p=cProfile.Profile(); p.enable(); cap('prof'); p.disable(); pstats.Stats(p).sort_stats('tottime').print_stats(14)
