"""Long-context evaluation: RULER, needle grids, InfiniteBench, PG-19 and mtrain's own retrieval, offline or online.

`mtrain eval MODEL --suite ruler,niah,infinitebench,pg19` on the command line; one process or a ring of them.
"""
