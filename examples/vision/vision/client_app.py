"""What a client does with the network that it is sent: it trains it on its own digits."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from gradcodec.flower import coded
from vision.task import make_network, partition, train

app = ClientApp(mods=[coded()])  # messages of other strategies than Coded go through untouched


@app.train()
def train_network(msg: Message, context: Context) -> Message:
    """A round."""
    config, node = context.run_config, context.node_config
    number, server_round = node["partition-id"], msg.content["config"]["server-round"]
    data = partition(number, node["num-partitions"], config["dirichlet"], config["seed"])
    network = make_network()
    network.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loss = train(network, data, config, seed=(config["seed"], server_round, number))
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(data[1])})
    return Message(RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics}), reply_to=msg)
