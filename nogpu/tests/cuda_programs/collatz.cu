// right: loops of different lengths, a switch, and an array in local memory
extern "C" __global__ void collatz(int* steps, int* values, int n)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n)
        return;
    int count = 0, bins[8] = {};
    for (long long x = i + 1; x != 1; count++) {
        bins[x % 8]++;
        x = x % 2 ? 3 * x + 1 : x / 2;
    }
    steps[i] = count;
    int value = 0;
    switch (i % 12) {
    case 0: value = bins[0]; break;
    case 1: value = bins[1] * 3; break;
    case 2: value = bins[2] - 7; break;
    case 3: value = bins[i % 8] << 2; break;
    case 4: value = 11; break;
    case 5: value = -bins[5]; break;
    case 6: value = bins[6] ^ 5; break;
    case 7: value = 100 / (bins[7] + 1); break;
    case 8: value = 8; break;
    case 9: value = bins[1] + bins[2]; break;
    default: value = -1;
    }
    values[i] = value;
}
