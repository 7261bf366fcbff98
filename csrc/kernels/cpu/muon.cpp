#include "../../rules/muon.h"
#include "program-inl.h"

namespace optim_ext {

template const RuleProgram& program_of<rules::MuonMomentum>();
template const RuleProgram& program_of<rules::MuonUpdate>();

}  // namespace optim_ext
