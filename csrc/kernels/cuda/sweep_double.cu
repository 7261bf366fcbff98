#define OPTIM_EXT_VALUE double
#include "sweep-inl.h"
