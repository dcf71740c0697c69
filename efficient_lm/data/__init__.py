"""Text in, packed batches out.

`data = DataConfig().build(run_dir=..., batch_size=..., seq_len=..., seed=...)` gives `data.train()` and
`data.validation()`, both of `Batch`.
"""

from efficient_lm.data.batch import Batch as Batch
from efficient_lm.data.config import Data as Data
from efficient_lm.data.config import DataConfig as DataConfig
from efficient_lm.data.iterator import TrainIterator as TrainIterator
from efficient_lm.data.packing import ValidationBatches as ValidationBatches
from efficient_lm.data.sources import ArrayRecordConfig as ArrayRecordConfig
from efficient_lm.data.sources import HuggingFaceConfig as HuggingFaceConfig
from efficient_lm.data.sources import JsonlConfig as JsonlConfig
from efficient_lm.data.sources import ParquetConfig as ParquetConfig
from efficient_lm.data.sources import SourceConfig as SourceConfig
from efficient_lm.data.sources import StdlibConfig as StdlibConfig
from efficient_lm.data.sources import TextConfig as TextConfig
from efficient_lm.data.sources import TokensConfig as TokensConfig
from efficient_lm.data.tokenizers import BytesConfig as BytesConfig
from efficient_lm.data.tokenizers import FileConfig as FileConfig
from efficient_lm.data.tokenizers import Tokenizer as Tokenizer
from efficient_lm.data.tokenizers import TokenizerConfig as TokenizerConfig
from efficient_lm.data.tokenizers import TrainBPEConfig as TrainBPEConfig
