-- Forgets calls that nobody repeats any more: some at a time. Index on called_at.
with old as (
    select c.token from shardmq.delayed_call c
     where c.called_at < (select shardmq.clock()) - interval '3 hours'
     order by c.called_at limit 10000
)
delete from shardmq.delayed_call c using old where c.token = old.token
