-- The node's time.
select shardmq.clock()
