#include "head/rows_impl.h"

namespace fastppo {

const RowKernels kRowsAvx512 = kKernels;

}  // namespace fastppo
