-- Publishes a message in the caller's transaction.
-- $1 topic  $2 payload  $3 key  $4 headers  $5 when to deliver it, null for at once
select shardmq.publish($1, $2, $3, $4, $5)
