// right: votes, matches, reductions and counts at a barrier, in a block of 48 threads
extern "C" __global__ void votes(int* out)
{
    int t = threadIdx.x, most = t < 32 ? 0xffffffff : 0xffff;
    out[t] = __ballot_sync(most, t % 3 == 0);
    out[64 + t] = __reduce_add_sync(most, t);
    out[128 + t] = __match_any_sync(most, t % 5);
    out[192 + t] = __syncthreads_count(t % 7 == 0);
    out[256 + t] = __any_sync(most, t == 40) + 2 * __all_sync(most, t < 32);
    out[320 + t] = __activemask();
    out[384 + t] = __syncthreads_and(t < 48) + 2 * __syncthreads_or(t > 46);
}
