// The commands that need nn/, in a program that was built without it.
#include "command.hpp"

namespace deeppcr::program {
namespace {

void add(Program& program, const std::string& name, const std::string& example) {
    program
        .add(name, "Not in this program: it was built without LibTorch", example,
             [name](Output&) -> Exit {
                 throw Error(name + " needs LibTorch, which this program was built without (DEEPPCR_BUILD_NN=OFF)");
             })
        .allow_extras()
        ->fallthrough(false);
}

}  // namespace

void add_reproduce(Program& program) { add(program, "reproduce", "  deeppcr reproduce"); }
void add_train(Program& program) { add(program, "train resnet", "  deeppcr train resnet"); }
void add_train_diffusion(Program& program) { add(program, "train diffusion", "  deeppcr train diffusion"); }
void add_train_language_model(Program& program) { add(program, "train lm", "  deeppcr train lm"); }
void add_train_swap(Program& program) { add(program, "train swap", "  deeppcr train swap"); }
void add_train_task(Program& program) { add(program, "train task", "  deeppcr train task parity"); }
void add_prepare(Program& program) { add(program, "prepare", "  deeppcr prepare text.txt"); }
void add_plan(Program& program) { add(program, "plan", "  deeppcr plan"); }
void add_generate(Program& program) { add(program, "generate", "  deeppcr generate lm.safetensors"); }
void add_validate(Program& program) { add(program, "validate", "  deeppcr validate resnet.safetensors"); }
void add_sample(Program& program) { add(program, "sample", "  deeppcr sample diffusion.safetensors"); }
void add_evaluate(Program& program) { add(program, "evaluate", "  deeppcr evaluate --model step.pt --inputs u.npy"); }

}  // namespace deeppcr::program
