// Which instruction set the kernels use: chosen at run time, so that one build runs on every machine.
#pragma once

namespace fastppo {

enum class Isa { portable, avx2, avx512, avx512_bf16 };

inline bool supports(Isa isa) {
#ifdef FASTPPO_X86
    switch (isa) {
        case Isa::portable: return true;
        case Isa::avx2:  // F16C came before it, and goes unasked: older compilers do not know its name
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
        case Isa::avx512:
            return supports(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case Isa::avx512_bf16: return supports(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    }
#endif
    return isa == Isa::portable;
}

}  // namespace fastppo
