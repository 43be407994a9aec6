import sys, json
sys.path.insert(0,"benchmarks")
import torch, throughput, plain
from test_benchmarks import *
from itertools import islice
def test_x(teacher, text, tmp_path):
    torch.manual_seed(0)
    rows = throughput.text_rows(str(text), teacher, 96, tmp_path)
    dense, spiking = throughput.students(teacher, rows, spiking=True)
    for prec in ("fp32","bf16"):
        config = TrainConfig(tokens=384, batch_size=2, lr=1e-3, warmup_steps=0, precision=prec)
        rows.rewind(); batch=next(iter(rows.batches(2)))
        for peer in ("ours","plain"):
            run=throughput.stage_run("spike",peer,teacher,dense,spiking,rows,config)
            with throughput.PEERS[peer](), torch.autocast("cpu",torch.bfloat16,enabled=prec=="bf16"):
                def bw(l):
                    with torch.autocast("cpu",enabled=False): l.backward()
                m=run.objective.accumulate(batch,bw)
            print(prec,peer,m)
            for n,p in run.parameters.items():
                if p.grad is not None and p.grad.norm()>50: print("   ",n,p.grad.norm().item())
    emb=spiking.model.embed_tokens.weight[batch["input_ids"]]
    h=spiking.model.layers[0].input_layernorm(emb); mx=spiking.model.layers[0].mixer
    print("zero tokens", (mx.in_neuron(h)==0).all(-1).sum())
    x,_,b,c,_,_=mx.ssm_inputs(h,None,None,batch["document_ids"])
    print("zero b", (b==0).all(-1).sum(), (c==0).all(-1).sum(), (x==0).all(-1).sum())
    print(mx.in_neuron.threshold)
