// wrong: race within a warp: lanes read what others have appended, without __syncwarp (llama.cpp#28475)
extern "C" __global__ void places(const int* expert, int n, int wanted, int* out)
{
    __shared__ int held[64];
    int found = 0;
    for (int first = 0; first < n; first += 32) {
        int i = first + threadIdx.x;
        bool is_it = i < n && expert[i] == wanted;
        unsigned lanes = __ballot_sync(0xffffffffu, is_it);
        if (is_it)
            held[found + __popc(lanes & ((1u << threadIdx.x) - 1))] = i;  // NAMED
        found += __popc(lanes);
    }
    for (int k = threadIdx.x; k < found; k += 32)
        out[k] = held[k];  // NAMED
}
