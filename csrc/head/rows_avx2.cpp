#include "head/rows_impl.h"

namespace fastppo {

const RowKernels kRowsAvx2 = kKernels;

}  // namespace fastppo
