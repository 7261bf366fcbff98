#include "../compiled_rule.h"

#define OPTIM_EXT_INL "tile_moves-inl.h"
#include "for_each_isa.h"

namespace optim_ext::cpu {

const TileMoves& tile_moves_for(Isa isa) {
  static constexpr TileMoves::Load loads[][kIsas] = {OPTIM_EXT_OF_EACH_ISA(load<float>),
                                                     OPTIM_EXT_OF_EACH_ISA(load<double>)};
  static constexpr TileMoves::Store stores[][kIsas] = {OPTIM_EXT_OF_EACH_ISA(store<float>),
                                                       OPTIM_EXT_OF_EACH_ISA(store<double>)};
  static constexpr auto of = [](int k) { return TileMoves{{loads[0][k], loads[1][k]}, {stores[0][k], stores[1][k]}}; };
  static constexpr TileMoves moves[] = {of(0), of(1), of(2)};
  return moves[static_cast<int>(isa)];
}

}  // namespace optim_ext::cpu
