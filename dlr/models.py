"""Base models: the embedded one, a local folder, or the Hugging Face Hub; LoRA through PEFT."""

import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlr.config import RunConfig

# PEFT 0.21 still asks transformers 5.23 for the old name of this property.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)

NANO = Path(__file__).parent / "nano"
NANO_ROUTER = NANO / "router"            # a trained, calibrated router for it
# Names of attention and MLP projections in the families we know; PEFT takes those a model has.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",        # Llama and kin
               "qkv_proj", "gate_up_proj", "out_proj", "fc1", "fc2",                               # Phi-3, OPT
               "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",                       # GPT-NeoX, Falcon
               "c_attn", "c_proj", "c_fc")                                                         # GPT-2


def load_base(config: RunConfig):
    """(model, tokenizer) of `config.model`, in evaluation mode and without gradients.

    Raises:
        ConnectionError: neither a local folder nor reachable on the Hub; the message names the embedded model.
    """
    source = str(NANO) if config.model == "nano" else config.model
    options = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attn_implementation}
    if config.load_in_4bit:
        from transformers import BitsAndBytesConfig
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    except Exception as error:          # a missing tokenizer, file or network each raise a class of their own
        if Path(source).exists():
            raise
        raise ConnectionError(f"The model {config.model!r} is neither a local folder nor to be had from the Hugging "
                              f"Face Hub ({type(error).__name__}). Without a network use model='nano', the embedded "
                              "base model.") from error
    if config.load_in_4bit:
        from peft import prepare_model_for_kbit_training
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model.eval().requires_grad_(False), tokenizer


def projections_of(model) -> list[str]:
    """The names in PROJECTIONS that occur inside the decoder layers of `model`."""
    from dlr.routed import decoder_and_layers
    _, layers = decoder_and_layers(model)
    there = {name.rsplit(".", 1)[-1] for name, _ in layers.named_modules()}
    return [name for name in PROJECTIONS if name in there]


def add_lora(model, config: RunConfig):
    """`model` with LoRA (Hu et al. 2021) on its attention and MLP projections, initialised from `config.seed`."""
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(config.seed)
    return get_peft_model(model, LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, bias="none",
        task_type="CAUSAL_LM", target_modules=projections_of(model)))
