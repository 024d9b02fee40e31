-- The partitions that batches wait for, if this relay has the lock and the lease: none who had them before
-- freezes any more. One entry of the index (partition, id) for each.
with recursive lane as (
    (select b.partition from shardmq.outbox_batch b order by b.partition limit 1)
    union all
    select (select b.partition from shardmq.outbox_batch b
             where b.partition > l.partition order by b.partition limit 1)
      from lane l where l.partition is not null
)
select l.partition from lane l
 where l.partition is not null and current_setting('shardmq.relay', true) = 'true'
