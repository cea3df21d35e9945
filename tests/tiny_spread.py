"""Standard deviations that the tiny models are drawn with."""

# Of the embeddings and of what each block adds to the residual stream.  As small as in trained
# models, so that the eps of a norm is not lost beside the mean square.
RESIDUAL_STD = 0.03
# Of the attention scores before the softmax: far from uniform attention.
SCORE_STD = 1.5
# Of the logits: log-likelihoods spread over several units.
LOGIT_STD = 2.0
