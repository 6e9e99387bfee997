"""The race that Triton may leave between a load and an asynchronous product."""

from bench.static.races import races

LOOP = """
%v = ttg.local_alloc : () -> !ttg.memdesc<2x64x64xbf16>
%0 = scf.for %i = %c0 to %R step %c1 {
  %2 = ttg.async_wait %1 {num = 2 : i32}
  %3 = ttg.memdesc_index %v[%i] : !ttg.memdesc<2x64x64xbf16>
  %4 = ttg.memdesc_trans %3 : !ttg.memdesc<64x64xbf16>
  {load}
  %6:1 = ttng.warp_group_dot %x, %4, %acc {isAsync = true} : tensor<64x64xf32>
  {wait}
  %8 = ttg.memdesc_index %v[%j] : !ttg.memdesc<2x64x64xbf16>
  %9 = ttg.async_copy_global_to_local %at, %8 mask %m : tensor<64x64x!tt.ptr<bf16>>
  scf.yield %6
}
"""
LOAD = "%5 = ttg.local_load %3 token %2 : tensor<64x64xbf16>"
WAIT = "%7:3 = ttng.warp_group_dot_wait %6, %x, %4 {pendings = N : i32}"


def loop(load, wait):
    return LOOP.replace("{load}", load).replace("{wait}", wait)


def test_a_factor_that_is_used_elsewhere():
    """Its buffer is written while the product that is not waited for reads it."""
    assert races(loop(LOAD, WAIT.replace("N", "1"))) == ["%v"]
    assert races(loop(LOAD, "")) == ["%v"]


def test_a_product_that_is_waited_for():
    assert not races(loop(LOAD, WAIT.replace("N", "0")))


def test_a_factor_of_products_alone():
    """It has a buffer more, so that one product may be in flight."""
    assert not races(loop("", WAIT.replace("N", "1")))
