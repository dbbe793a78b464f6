// Where this build has no MPI.
#include <deeppcr/error.hpp>

#include "distribute/messages.hpp"

namespace deeppcr::distribute {

std::unique_ptr<Messages> connect_world() {
    if (started_by_launcher())
        throw Error(
            "Group::world: started as one of several processes, but this build has no MPI: install "
            "libopenmpi-dev, and build with DEEPPCR_BUILD_MPI");
    return nullptr;
}

}  // namespace deeppcr::distribute
