"""What a client does with the adapter that it is sent: it trains it on its own records."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from flowertune.dataset import partition, shuffled
from flowertune.models import get_model, learning_rate, train

app = ClientApp()


@app.train()
def train_adapter(msg: Message, context: Context) -> Message:
    """A round's steps, with the learning rate of the round."""
    config, node = context.run_config, context.node_config
    server_round, number = msg.content["config"]["server-round"], node["partition-id"]
    records = partition(config, number, node["num-partitions"])

    model = get_model(config)
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    batches = shuffled(records, config, seed=f"{config['seed']}/{server_round}/{number}")
    loss = train(model, batches, learning_rate(server_round, config))

    arrays = ArrayRecord({name: tensor.cpu() for name, tensor in get_peft_model_state_dict(model).items()})
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(records)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)
