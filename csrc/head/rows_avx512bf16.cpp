#include "head/rows_impl.h"

namespace fastppo {

const RowKernels kRowsAvx512Bf16 = kKernels;

}  // namespace fastppo
