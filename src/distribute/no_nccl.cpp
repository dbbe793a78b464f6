// Where this build has no NCCL.
#include "distribute/gpus.hpp"

namespace deeppcr::distribute {

std::unique_ptr<Gpus> connect_gpus(Group& /*group*/) { return nullptr; }

}  // namespace deeppcr::distribute
