"""nbval runs the notebooks on the toy preset, in a folder of its own: kernels inherit this."""

import os
import tempfile

os.environ["DLR_PRESET"] = "toy"
os.environ["DLR_RESULTS"] = tempfile.mkdtemp(prefix="dlr-toy-")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.environ.get("PYTHONPATH", "")])
