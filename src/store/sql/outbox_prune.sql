-- Forgets calls that nobody repeats any more: some at a time; how many they were. Index on called_at, and by
-- ctid, since no plan for that may read the whole table; nobody changes a row of it.
-- $1 at most so many
with gone as (
    delete from shardmq.delayed_call x
     where x.ctid = any(array(
           select c.ctid from shardmq.delayed_call c
            where c.called_at < (select shardmq.clock()) - interval '3 hours'
            order by c.called_at limit $1::bigint))
    returning 1
)
select count(*) from gone
