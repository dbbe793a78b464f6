// A rank that ends while the others wait for it, as group_failures.sh runs it by mpirun:
//     group_failures killed | throws | exits | works | initialises
// Without a defence the others would wait for ever. The last one initialises MPI itself, as any program may.
#define OMPI_SKIP_MPICXX
#include <mpi.h>

#include <csignal>
#include <iostream>
#include <stdexcept>
#include <string>

#include <deeppcr/group.hpp>

int main(int, char** arguments) {
    const std::string how = arguments[1];
    if (how == "initialises") MPI_Init(nullptr, nullptr);
    deeppcr::Group& group = deeppcr::Group::world();
    group.barrier();
    if (group.rank() == group.size() - 1) {
        if (how == "killed") std::raise(SIGKILL);
        if (how == "throws") throw std::runtime_error("the sensor is off");
        if (how == "exits") {
            std::cerr << "error: no such file\n";
            return 1;
        }
    }
    group.barrier();
    if (group.rank() == 0) std::cout << group.size() << " ranks are done\n";
    if (how == "initialises") MPI_Finalize();
    return 0;
}
