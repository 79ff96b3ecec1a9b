import pytest
import torch
from conftest import run_code
from torch import nn

from captioning.lazy_compiler import _disable, meta_device


@pytest.mark.slow
def test_torchvision_and_timm_import_the_compiler_when_they_use_it():
    run_code(
        "import sys\n"
        "import torch\n"
        "disable = torch.compiler.disable\n"
        "from captioning import backbones, images\n"
        "assert backbones.count_stages('tf_efficientnet_lite0') > 3\n"
        "assert torch.compiler.disable is disable\n"
        "assert not any(name.startswith('torch._dynamo') for name in sys.modules)\n"
        "from torchvision.ops import roi_align\n"
        "image = torch.arange(16.0).reshape(1, 1, 4, 4)\n"
        "assert roi_align(image, [torch.tensor([[0.0, 0.0, 2.0, 2.0]])], 1, aligned=True).item() == 2.5\n"
        "from torchvision.ops.roi_align import is_compile_supported\n"
        "assert is_compile_supported('cpu')\n"
        "import torch._dynamo.utils\n"
        "assert torch._dynamo.utils.counters is not None\n"
    )


def test_a_name_of_the_compiler_that_is_not_expected_imports_it():
    run_code(
        "import sys\n"
        "from captioning.lazy_compiler import compiler_left_out\n"
        "with compiler_left_out():\n"
        "    from torch._dynamo.utils import counters, is_compile_supported, istype\n"
        "import torch._dynamo.utils\n"
        "assert torch._dynamo.utils.counters is counters\n"
        "assert torch._dynamo.utils.istype is istype\n"
        "assert is_compile_supported('cpu')\n"
    )


@pytest.mark.slow
def test_a_function_that_is_not_compiled_is_called_as_it_is():
    compiled = []

    @_disable
    def double(x: torch.Tensor) -> torch.Tensor:
        """Double."""
        compiled.append(torch.compiler.is_compiling())
        return 2 * x

    @_disable(recursive=False)
    def triple(x: torch.Tensor) -> torch.Tensor:
        return 3 * x

    assert (double.__name__, double.__doc__) == ("double", "Double.")
    assert triple(torch.tensor(2.0)) == 6
    add = torch.compile(lambda x: double(x) + 1, backend="eager")
    assert add(torch.tensor(2.0)) == 5
    assert double(torch.tensor(2.0)) == 4
    assert compiled == [False, False]


def test_networks_on_the_meta_device_have_the_shapes_of_real_ones():
    def build() -> nn.Module:
        return nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 3), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    with meta_device():
        network = build()
    assert all(parameter.is_meta for parameter in network.parameters())
    assert {name: value.shape for name, value in network.state_dict().items()} == {
        name: value.shape for name, value in build().state_dict().items()
    }
    assert torch.empty(1).device.type == "cpu"


def test_networks_on_the_meta_device_are_built_without_the_compiler():
    run_code(
        "import sys\n"
        "from captioning.lazy_compiler import meta_device\n"
        "from model import DECODERS\n"
        "with meta_device():\n"
        "    decoders = [build(8, 8, 50) for build in DECODERS.values()]\n"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)\n"
    )
