#define OPTIM_EXT_VALUE float
#include "sweep-inl.h"
