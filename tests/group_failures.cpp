// A rank that ends while the others wait for it, as group_failures.sh runs it by mpirun:
//     group_failures [initialises] works | dawdles | killed | throws | exits | leaves | unheard
// Without a defence the others would wait for ever. One that initialises MPI itself, as any program may, ends it too.
#define OMPI_SKIP_MPICXX
#include <mpi.h>

#include <chrono>
#include <csignal>
#include <iostream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <deeppcr/group.hpp>

int main(int count, char** arguments) {
    const std::string how = arguments[count - 1];
    const bool initialises = count > 2;
    if (initialises) MPI_Init(nullptr, nullptr);
    deeppcr::Group& group = deeppcr::Group::world();
    group.barrier();
    if (group.rank() == group.size() - 1) {
        if (how == "killed") std::raise(SIGKILL);
        if (how == "throws") throw std::runtime_error("the sensor is off");
        if (how == "exits") {
            std::cerr << "error: no such file\n";
            return 1;
        }
        if (how == "leaves" || how == "unheard") {
            if (initialises) MPI_Finalize();
            return 0;
        }
        if (how == "dawdles") std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    }
    // Too long to be sent before somebody receives it.
    if (how == "unheard" && group.rank() == 0)
        group.pass<double>(group.size() - 1, std::vector<double>(1 << 20), -1, {});
    group.barrier();
    if (group.rank() == 0) std::cout << group.size() << " ranks are done\n";
    if (initialises) MPI_Finalize();
    return 0;
}
